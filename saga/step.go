package saga

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
	"github.com/deed-go/deed/eventstore"
)

// Step is the context of one attempt of a step or a reaction. It ends when the
// time given by [Within] is over, when the engine stops and does not wait any
// longer, or at once when another engine has taken over: context.Cause is then
// [ErrTimeout], [ErrStopped], or wraps projection.ErrFenced. It is safe for
// concurrent use, but not to be kept.
type Step struct {
	context.Context
	key     string
	attempt int
	bus     *command.Bus
	event   *eventstore.Recorded
	sent    map[string]int
	gate    chan struct{}
	beat    *heart
	engine  *Engine // of a reaction
	first   bool    // of the transactions of its run's life
}

// NewStep returns a step to call a function with in a unit test of its own;
// within a saga the engine makes them. [Send] does not work with it.
func NewStep(ctx context.Context, key string, attempt int) Step {
	return Step{Context: ctx, key: key, attempt: attempt}
}

// IdempotencyKey names the step for ever: it is the same at every attempt, on
// every node, and different for every other step. Give it to whatever is
// called, so that a repeated attempt is recognised. It has at most 256 bytes.
func (s Step) IdempotencyKey() string { return s.key }

// Attempt counts the attempts from 1 on. One that was cut off by the end of
// the process is not counted.
func (s Step) Attempt() int { return s.attempt }

// Event returns the event that a reaction reacts to; the zero Recorded in a
// saga's step.
func (s Step) Event() eventstore.Recorded {
	if s.event == nil {
		return eventstore.Recorded{}
	}
	return *s.event
}

// Send executes a command from within a step or a reaction, with its effect
// exactly once however often the step is attempted: the commands carry
// idempotency keys derived from the step's, their aggregate and their order. A
// reaction that sends commands is a process manager.
//
// Within a saga prefer [Execute], which is a step of its own.
func Send[S any, C command.Command[S]](step Step, def *aggregate.Definition[S], c C) error {
	if step.bus == nil {
		return fmt.Errorf("%w: the step has no command bus: it was not made by an engine", eventstore.ErrInvalid)
	}
	target := fmt.Sprintf("send:%s-%s:%T", def.Category(), c.AggregateID(), c)
	step.gate <- struct{}{}
	step.sent[target]++
	n := step.sent[target]
	<-step.gate
	_, err := command.Execute(step, step.bus, def, c, command.Key(keyOf(step.key, target+"#"+strconv.Itoa(n))))
	return err
}

// keyOf joins the parts of an idempotency key; a long one is hashed.
func keyOf(owner, part string) string {
	key := owner + "/" + part
	if len(key) <= eventstore.MaxKeyBytes {
		return key
	}
	sum := sha256.Sum256([]byte(key))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// policy says how a step is tried.
type policy struct {
	attempts    int // 0: without limit
	within      time.Duration
	total       time.Duration
	silence     time.Duration
	first, most time.Duration
	final       []error
	limits      []limit
	// whole says that the step happens or does not, however often it is tried, and
	// that it is done quickly: nothing but its engine's end cuts it off.
	whole bool
}

// whole makes a step one that happens or does not.
func whole(p *policy) { p.whole = true }

// hopeless reports whether trying again cannot help, as [NotAfter] says.
func (p *policy) hopeless(err error) bool {
	return slices.ContainsFunc(p.final, func(target error) bool { return errors.Is(err, target) })
}

func defaultPolicy() policy { return policy{first: time.Second, most: 5 * time.Minute} }

// StepOption changes how a step is tried. Without any, a step is tried until
// it succeeds: after 1 s, 2 s, 4 s, … and then every 5 minutes.
type StepOption interface{ applyStep(*policy) }

type policyOption func(*policy)

func (o policyOption) applyStep(p *policy)     { o(p) }
func (o policyOption) applyReaction(r *policy) { o(r) }

type stepOption func(*policy)

func (o stepOption) applyStep(p *policy) { o(p) }

// Retry limits the number of attempts, the first included. After the last one
// the code gets the error; for a reaction, the event goes to the dead letters.
// Zero or less means without limit.
func Retry(attempts int) policyOption { //nolint:revive // usable as a step's and as a reaction's option
	return func(p *policy) { p.attempts = max(attempts, 0) }
}

// Within limits the time of each attempt: the step's context ends after d, and
// the attempt has then failed with [ErrTimeout]. It is real time, not the
// engine's clock, because what the step calls takes real time. An attempt that
// ignores its context is not cut off.
func Within(d time.Duration) policyOption { //nolint:revive // usable as a step's and as a reaction's option
	return func(p *policy) { p.within = d }
}

// Overall limits the time of all attempts together, with the pauses between
// them, counted from [Run.Now] as the step begins. When it is over, or the next
// attempt would be too late, the code gets the last error.
func Overall(d time.Duration) StepOption {
	return stepOption(func(p *policy) { p.total = d })
}

// NotAfter ends the attempts when one fails with any of the errors, by
// errors.Is, as if it were [Terminal].
func NotAfter(errs ...error) policyOption { //nolint:revive // usable as a step's and as a reaction's option
	return func(p *policy) { p.final = append(p.final, errs...) }
}

// Silence ends an attempt that has not called [Step.Heartbeat] for d, as
// [Within] does one that takes too long.
func Silence(d time.Duration) StepOption {
	return stepOption(func(p *policy) { p.silence = d })
}

// Backoff sets the pause after the first failed attempt, and the longest one;
// in between it doubles. Each pause varies by up to a fifth, so that steps that
// failed together are not tried together.
func Backoff(first, most time.Duration) policyOption { //nolint:revive // usable as a step's and as a reaction's option
	return func(p *policy) { p.first, p.most = max(first, time.Millisecond), max(most, first, time.Millisecond) }
}

// pause is the time between an attempt and the next one. It depends on nothing
// but its arguments, so that tests repeat.
func (p *policy) pause(key string, attempt int) time.Duration {
	d := p.first
	for i := 1; i < attempt && d < p.most; i++ {
		d *= 2
	}
	d = min(d, p.most)
	h := fnv.New64a()
	_, _ = h.Write([]byte(key))
	_, _ = h.Write([]byte(strconv.Itoa(attempt)))
	const fraction = 1 << 16
	jitter := float64(h.Sum64()%fraction)/fraction - 0.5 // -0.5 … 0.5
	return d + time.Duration(jitter*0.4*float64(d))
}

// attempt runs fn once, and turns a panic into an error.
func attempt(ctx context.Context, within, silence time.Duration, step Step, fn func(Step) error) (err error) {
	if within > 0 {
		limited, cancel := context.WithTimeoutCause(ctx, within, ErrTimeout)
		defer cancel()
		ctx = limited
	}
	if silence > 0 && step.beat != nil {
		heard, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		step.beat.alarm = time.AfterFunc(silence, func() { cancel(ErrTimeout) })
		step.beat.silence = silence
		defer step.beat.alarm.Stop()
		ctx = heard
	}
	step.Context = ctx
	step.sent = map[string]int{}
	step.gate = make(chan struct{}, 1)
	defer func() {
		if p := recover(); p != nil {
			err = &panicError{value: p, stack: stack()}
		}
	}()
	err = fn(step)
	if err != nil && (within > 0 || silence > 0) && context.Cause(ctx) == ErrTimeout { //nolint:errorlint // the cause is set here
		err = fmt.Errorf("%w after %s: %w", ErrTimeout, max(within, silence), err)
	}
	return err
}

var errEnded = errors.New("the code ended its goroutine (runtime.Goexit, for example by t.FailNow)")

// surviving runs fn on a goroutine of its own, which is all that runtime.Goexit
// then ends.
func surviving(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errEnded
		defer func() { done <- err }()
		err = fn()
	}()
	return <-done
}
