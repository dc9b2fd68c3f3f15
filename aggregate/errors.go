package aggregate

import (
	"fmt"
	"runtime/debug"
)

// PanicError is a panic of Decide, of Boundary or of a fold. It fails the call
// that caused it and no other.
type PanicError struct {
	// While says what was running.
	While string
	// Value is what the panic was called with.
	Value any
	// Stack is the stack of the panic.
	Stack []byte
}

// Error names what panicked and the panic's value.
func (e *PanicError) Error() string { return fmt.Sprintf("%s panicked: %v", e.While, e.Value) }

// Unwrap returns the panic's value if it is an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// caught turns a panic into the error; use it with defer.
func caught(err *error, while func() string) {
	if p := recover(); p != nil {
		*err = &PanicError{While: while(), Value: p, Stack: debug.Stack()}
	}
}
