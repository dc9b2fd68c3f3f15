// Package saga has the signatures of the real one, simplified.
package saga

import (
	"context"
	"time"
)

type Run struct{ id string }

func (r *Run) ID() string                                    { return r.id }
func (r *Run) Now() time.Time                                { return time.Now() }
func (r *Run) Sleep(name string, d time.Duration) error      { return nil }
func (r *Run) Until(name string, at time.Time) error         { return nil }
func (r *Run) OnRollback(name string, undo func(*Run) error) {}
func (r *Run) Settled()                                      {}

type Step struct{ context.Context }

func (s Step) IdempotencyKey() string { return "" }

type (
	Definition[In, Out any] struct{}
	Option[In any]          struct{}
	Reaction                struct{}
	Recorded                struct{ Time time.Time }
	Host                    interface{ Sagas() }
)

func Define[In, Out any](name string, run func(*Run, In) (Out, error), options ...Option[In]) *Definition[In, Out] {
	return nil
}

func On[E, In any](start func(e E, r Recorded) (string, In)) Option[In] { return Option[In]{} }

func React[E any](name string, handle func(Step, E) error) *Reaction { return nil }

func Do[T any](s *Run, name string, fn func(Step) (T, error)) (T, error) {
	return fn(Step{})
}

func Local[T any](s *Run, name string, fn func() T) T { return fn() }

func Tx[T any](s *Run, name string, fn func(Step, any) (T, error)) (T, error) { return fn(Step{}, nil) }

func Execute[C any](s *Run, name string, c C) error { return nil }

func Await[E any](s *Run, timeout time.Duration) (E, error) {
	var e E
	return e, nil
}

func All(s *Run, name string, branches ...func(*Run) error) error { return nil }

func Race(s *Run, name string, branches ...func(*Run) error) (int, error) { return 0, nil }

type Signal[T any] struct{}

func (s Signal[T]) Wait(r *Run, timeout time.Duration) (T, error) {
	var v T
	return v, nil
}

func Start[In, Out any](ctx context.Context, host Host, d *Definition[In, Out], id string, in In) error {
	return nil
}
