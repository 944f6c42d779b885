package main

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestSaid(t *testing.T) {
	done, cancel := context.WithCancel(context.Background())
	cancel()
	verify, _, err := newRootCommand().Find([]string{"checkpoint", "verify"})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		ctx  context.Context
		args []string
		err  error
		want string
	}{
		{done, nil, context.Canceled, "checkpoint verify: interrupted"},
		{done, nil, fmt.Errorf("save vm1: %w: it goes on", context.Canceled), "save vm1: interrupted: it goes on"},
		{context.Background(), nil, context.Canceled, "context canceled"}, // by somebody else
		{done, nil, errors.New("no such file"), "no such file"},
		{done, []string{"a\nb", "--to=c\td"}, errors.New("open a\nb: /x/c\td: no"), `open a\nb: /x/c\td: no`},
		{done, []string{"", "é b"}, errors.Join(errors.New("open é b"), errors.New("close")), "open é b; close"},
	} {
		if got := said(test.ctx, verify, test.args, test.err); got != test.want {
			t.Errorf("%q: %q, want %q", test.err, got, test.want)
		}
	}
}
