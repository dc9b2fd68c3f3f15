package esdb

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

var rv = eventstore.Stream{Category: "account", ID: "ann"}

func rvCommit(n int, cs ...eventstore.Condition) eventstore.Commit {
	c := eventstore.Commit{Conditions: cs}
	for range n {
		c.Events = append(c.Events, eventstore.Event{Stream: rv, Type: "happened", Data: []byte(`{}`)})
	}
	return c
}

func rvRead(ctx context.Context, s *Store, q eventstore.Query, o eventstore.ReadOptions) (n int, err error) {
	for _, err = range s.Read(ctx, q, o) {
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// all of a stream's events are hidden ($maxAge, $tb).
func TestStore_AllHidden(t *testing.T) {
	db := newDatabase()
	s, err := Open(t.Context(), "", withDriver(db.client()), Patience(time.Second))
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Append(t.Context(), rvCommit(3))
	require.NoError(t, err)
	db.truncate("account-ann", 3)
	fresh, err := Open(t.Context(), "", withDriver(db.client()), Patience(time.Second))
	require.NoError(t, err)
	defer fresh.Close()
	for name, f := range map[string]func() error{
		"read": func() error {
			_, err := rvRead(t.Context(), fresh, eventstore.OneStream(rv), eventstore.ReadOptions{})
			return err
		},
		"backward": func() error {
			_, err := rvRead(t.Context(), fresh, eventstore.OneStream(rv), eventstore.ReadOptions{Backward: true})
			return err
		},
		"lookup": func() error { _, _, err := fresh.Lookup(t.Context(), rv, "k"); return err },
		"append": func() error { _, err := fresh.Append(t.Context(), rvCommit(1)); return err },
		"append new": func() error {
			_, err := fresh.Append(t.Context(), rvCommit(1, eventstore.StreamAt(rv, eventstore.Revision{})))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			require.ErrorIs(t, f(), eventstore.ErrGap)
		})
	}
}

// a node that lags says that a subscription has caught up.
type lagging struct {
	*client
	lag func() int // how many events the node has; <0: all
}

type laggingSub struct {
	driver.Subscription
	l      *lagging
	said   bool
	closed chan struct{}
}

func (l *lagging) SubscribeAll(ctx context.Context, after driver.AllFrom, f driver.Filter) (driver.Subscription, error) {
	sub, err := l.client.SubscribeAll(ctx, after, f)
	return &laggingSub{Subscription: sub, l: l}, err
}

func (s *laggingSub) Next(ctx context.Context) (driver.Message, error) {
	if n := s.l.lag(); n >= 0 && s.Subscription.(*fakeSubscription).at >= n && !s.said {
		s.said = true
		return driver.Message{CaughtUp: true}, nil
	}
	return s.Subscription.Next(ctx)
}

func TestStore_LaggingNode(t *testing.T) {
	db := newDatabase()
	lag := -1
	d := &lagging{client: db.client(), lag: func() int { return lag }}
	s, err := Open(t.Context(), "", withDriver(d), Tail(1, 1))
	require.NoError(t, err)
	defer s.Close()
	for range 5 {
		_, err = s.Append(t.Context(), rvCommit(2))
		require.NoError(t, err)
	}
	lag = len(db.all) - 4 // the last four are not there yet when it says so; they come a moment later
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	n, err := rvRead(ctx, s, eventstore.All(), eventstore.ReadOptions{})
	t.Logf("read %d %v", n, err)
	if n != 10 {
		t.Errorf("Read: %d events of 10, no error", n)
	}
	n = 0
	for b, err := range s.Subscribe(ctx, eventstore.All(), 0) {
		require.NoError(t, err)
		n += len(b.Events)
		if b.Through >= s.tip.known {
			break
		}
	}
	require.Equal(t, 10, n, "Subscribe: events up to Through")
}

// the server ends calls with Canceled.
func TestStore_CanceledByServer(t *testing.T) {
	db := newDatabase()
	s, err := Open(t.Context(), "", withDriver(db.client()))
	require.NoError(t, err)
	defer s.Close()
	reads, stop := 0, make(chan struct{})
	db.mu.Lock()
	db.reads = func() error {
		db.mu.Lock()
		defer db.mu.Unlock()
		if reads++; reads == 2000 {
			close(stop)
		}
		return &driver.Error{Kind: driver.Ended, Err: errors.New("rpc error: code = Canceled desc = call cancelled")}
	}
	db.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for range s.Subscribe(ctx, eventstore.All(), 0) {
		}
	}()
	select {
	case <-stop:
		cancel()
		t.Error("2000 reads: no pause")
	case <-time.After(2 * time.Second):
		cancel()
	}
}

type dropping struct {
	*client
	err chan error
}
type droppingSub struct {
	driver.Subscription
	d *dropping
}

func (d *dropping) SubscribeAll(ctx context.Context, after driver.AllFrom, f driver.Filter) (driver.Subscription, error) {
	sub, err := d.client.SubscribeAll(ctx, after, f)
	return &droppingSub{sub, d}, err
}

func (s *droppingSub) Next(ctx context.Context) (driver.Message, error) {
	select {
	case err := <-s.d.err:
		return driver.Message{}, err
	default:
		return s.Subscription.Next(ctx)
	}
}

func TestStore_SubscriptionCanceledByServer(t *testing.T) {
	for _, kind := range []driver.Kind{driver.Ended, driver.Rejected} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			db := newDatabase()
			d := &dropping{client: db.client(), err: make(chan error, 1)}
			s, err := Open(t.Context(), "", withDriver(d))
			require.NoError(t, err)
			defer s.Close()
			_, err = s.Append(t.Context(), rvCommit(1))
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			n := 0
			for b, err := range s.Subscribe(ctx, eventstore.All(), 0) {
				require.NoError(t, err)
				n += len(b.Events)
				if n >= 3 {
					break
				}
				if n == 1 || n == 2 {
					if n == 1 {
						_, _ = s.Append(ctx, rvCommit(1))
						continue
					}
					d.err <- &driver.Error{Kind: kind, Err: errors.New("ended by the server")}
					_, _ = s.Append(ctx, rvCommit(2))
				}
			}
		})
	}
}
