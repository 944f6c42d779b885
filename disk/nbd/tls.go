package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrCredentials are TLS credentials that cannot be used.
var ErrCredentials = errors.New("TLS credentials")

// ServerTLS makes a server's configuration of a directory as QEMU's tls-creds-x509
// has it: server-cert.pem, server-key.pem and, where verifyClients is set, the
// ca-cert.pem that signed the certificates of those who may connect.
func ServerTLS(dir string, verifyClients bool) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS12}
	if verifyClients {
		// GnuTLS, which QEMU's tools use, finds no RSA certificate of its own that suits
		// what crypto/tls asks for by TLS 1.3.
		config.MaxVersion = tls.VersionTLS12
		config.ClientAuth = tls.RequireAndVerifyClientCert
		if config.ClientCAs, err = authority(dir); err != nil {
			return nil, err
		}
	}
	return config, nil
}

// ClientTLS makes a client's configuration of such a directory: ca-cert.pem and,
// where they are there, client-cert.pem and client-key.pem. The server must be
// serverName, or where that is "" the host of its address.
func ClientTLS(dir, serverName string) (*tls.Config, error) {
	roots, err := authority(dir)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: roots, ServerName: serverName, MinVersion: tls.VersionTLS12}
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{own}
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	return config, nil
}

func authority(dir string) (*x509.CertPool, error) {
	path := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%w: %s holds no certificate", ErrCredentials, path)
	}
	return pool, nil
}
