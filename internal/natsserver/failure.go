package natsserver

import (
	"fmt"
	"strings"
	"sync"
)

// failure is a server's log, of which it keeps why the server does not start.
type failure struct {
	mu    sync.Mutex
	first string
}

func (f *failure) Fatalf(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.first == "" {
		f.first = fmt.Sprintf(format, args...)
	}
}

func (f *failure) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.first == "":
		return nil
	case strings.HasPrefix(f.first, "Error listening on port"):
		return fmt.Errorf("%w: %s", errPort, f.first)
	}
	return fmt.Errorf("the server says: %s", f.first)
}

func (f *failure) Noticef(string, ...any) {}
func (f *failure) Warnf(string, ...any)   {}
func (f *failure) Errorf(string, ...any)  {}
func (f *failure) Debugf(string, ...any)  {}
func (f *failure) Tracef(string, ...any)  {}
