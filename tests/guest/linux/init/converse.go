//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/gnomon-vmm/gnomon/tests/guest/wire"
)

// converse sends a little and compares what comes back, again and again on one
// connection, until it is told to stop. A connection that ends first is an error.
func converse(ctx context.Context, args wire.ConverseArgs) (any, error) {
	conn, err := dial(ctx, args.Network, args.Address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	sent, got := make([]byte, wire.ConversePiece), make([]byte, wire.ConversePiece)
	var result wire.ConverseResult
	for ctx.Err() == nil {
		wire.Pattern(sent, args.Seed, result.Rounds*wire.ConversePiece)
		_, err := conn.Write(sent)
		if err == nil {
			_, err = io.ReadFull(conn, got)
		}
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("after %d rounds: %w", result.Rounds, err)
		}
		if !bytes.Equal(sent, got) {
			result.Wrong++
		}
		result.Rounds++
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(args.MS) * time.Millisecond):
		}
	}
	return result, nil
}
