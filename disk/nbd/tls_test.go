package nbd

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// credentials makes a directory of an authority, and of a server and a client
// that it has signed.
func credentials(t *testing.T, newKey func() (crypto.Signer, error)) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var authority *x509.Certificate
	var authorityKey crypto.Signer
	for serial, name := range []string{"ca", "server", "client"} {
		key, err := newKey()
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(serial + 1)),
			Subject:      pkix.Name{CommonName: name},
			NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage:              x509.KeyUsageDigitalSignature,
			BasicConstraintsValid: true,
		}
		switch name {
		case "ca":
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
			authority, authorityKey = c, key
		case "server":
			c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		case "client":
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}
		signed, err := x509.CreateCertificate(rand.Reader, c, authority, key.Public(), authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		write(name+"-cert.pem", "CERTIFICATE", signed)
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(name+"-key.pem", "PRIVATE KEY", private)
	}
	return dir
}

func ecdsaKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// rsaKey is a key as certtool makes them, which QEMU's documentation uses.
func rsaKey() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) }

// eachKey runs a test with credentials of each kind of key.
func eachKey(t *testing.T, test func(t *testing.T, dir string)) {
	for name, newKey := range map[string]func() (crypto.Signer, error){"ECDSA": ecdsaKey, "RSA": rsaKey} {
		t.Run(name, func(t *testing.T) { test(t, credentials(t, newKey)) })
	}
}

func TestTLS(t *testing.T) { eachKey(t, testTLS) }

func testTLS(t *testing.T, dir string) {
	config, err := ServerTLS(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := newMemory(8 << 20)
	serveAt(t, l, ServerOptions{TLS: config}, Export{Name: "x", Node: m})
	address := l.Addr().String()
	clientConfig, err := ClientTLS(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	c := use(t, address, "x", ClientOptions{TLS: clientConfig})
	data, got := make([]byte, 3<<20), make([]byte, 3<<20)
	pattern(data, 77)
	if err := c.Writev([][]byte{data}, 77); err != nil {
		t.Fatal(err)
	}
	if err := c.Readv([][]byte{got}, 77); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read: %v", err)
	}
	if _, err := Dial(context.Background(), address, "x", ClientOptions{}); !errorIs(err, ErrRefused) {
		t.Errorf("a client without TLS: %v", err)
	}
	stranger := clientConfig.Clone()
	stranger.Certificates = nil
	if _, err := Dial(context.Background(), address, "x", ClientOptions{TLS: stranger}); err == nil {
		t.Error("a client without a certificate is admitted")
	}
	host, port, _ := net.SplitHostPort(address)
	out := tool(t, "qemu-io", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+dir,
		"--image-opts", "driver=nbd,host="+host+",port="+port+",export=x,tls-creds=t", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", "-c", "flush")
	if bytes.Contains([]byte(out), []byte("fail")) || m.content()[1000] != 3 {
		t.Errorf("qemu-io by TLS: %s", out)
	}
	if err := exec.Command("qemu-io", "-f", "raw", "nbd://"+address+"/x", "-c", "read 0 1").Run(); err == nil {
		t.Error("qemu-io without TLS is admitted")
	}
}

func TestTLSAtQEMUNbd(t *testing.T) { eachKey(t, testTLSAtQEMUNbd) }

func testTLSAtQEMUNbd(t *testing.T, dir string) {
	image, socket := filepath.Join(t.TempDir(), "a.raw"), filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(image, bytes.Repeat([]byte{5}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, socket, "qemu-nbd", "-k", socket, "-t", "-e", "4", "-x", "x", "-f", "raw",
		"--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir="+dir, "--tls-creds", "t", image)
	config, err := ClientTLS(dir, "localhost")
	if err != nil {
		t.Fatal(err)
	}
	c := use(t, "unix:"+socket, "x", ClientOptions{TLS: config})
	got := make([]byte, 1<<20)
	if err := c.Readv([][]byte{got}, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{5}, 1<<20)) {
		t.Errorf("read: %v", err)
	}
	other := config.Clone()
	other.ServerName = "another.example"
	if _, err := Dial(context.Background(), "unix:"+socket, "x", ClientOptions{TLS: other}); err == nil {
		t.Error("a server of another name is accepted")
	}
}
