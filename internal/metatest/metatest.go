// Package metatest runs a test against something broken, to see that it fails, and
// says how many tests run at once.
// It imports nothing of deed, and only tests may import it.
package metatest

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// Failure runs the test body, stopping it at its first fatal failure, and
// returns what it reported; empty if it passed. Cleanups have run when it
// returns. The body must end: broken things that wait for ever need a context
// with a deadline.
func Failure(t *testing.T, body func(testing.TB)) string {
	t.Helper()
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer r.cleanUp()
		body(r)
	}()
	<-done
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.failed {
		return ""
	}
	if len(r.said) == 0 {
		return "failed without a word"
	}
	return strings.Join(r.said, "\n")
}

// recorder keeps failures to itself. It embeds the real TB for all that does
// not report.
type recorder struct {
	testing.TB
	mu       sync.Mutex
	failed   bool
	said     []string
	cleanups []func()
}

func (r *recorder) cleanUp() {
	for {
		r.mu.Lock()
		n := len(r.cleanups)
		if n == 0 {
			r.mu.Unlock()
			return
		}
		next := r.cleanups[n-1]
		r.cleanups = r.cleanups[:n-1]
		r.mu.Unlock()
		next()
	}
}

func (r *recorder) report(fatal bool, message string) {
	r.mu.Lock()
	r.failed = true
	if message != "" {
		r.said = append(r.said, message)
	}
	r.mu.Unlock()
	if fatal {
		runtime.Goexit()
	}
}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

func (r *recorder) Fail()                             { r.report(false, "") }
func (r *recorder) FailNow()                          { r.report(true, "") }
func (r *recorder) Error(args ...any)                 { r.report(false, fmt.Sprint(args...)) }
func (r *recorder) Errorf(format string, args ...any) { r.report(false, fmt.Sprintf(format, args...)) }
func (r *recorder) Fatal(args ...any)                 { r.report(true, fmt.Sprint(args...)) }
func (r *recorder) Fatalf(format string, args ...any) { r.report(true, fmt.Sprintf(format, args...)) }
func (r *recorder) Helper()                           {}
func (r *recorder) Log(...any)                        {}
func (r *recorder) Logf(string, ...any)               {}
