package main

import "github.com/spf13/cobra"

func newHostCommand() *cobra.Command { return &cobra.Command{Use: "host"} }
