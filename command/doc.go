// Package command executes commands: structs that decide, on the state of an
// aggregate, which events happen.
//
// It may import eventstore, aggregate, and internal packages.
package command
