package projection_test

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"math/big"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// Projections are given copies of one decoded event if nothing that a handler
// does to its copy, or keeps of it, can be seen through another one.
func TestEvent_WhatIsShared(t *testing.T) {
	t.Parallel()
	type part struct{ A, b string }
	type linked struct {
		Next *part
	}
	for _, c := range []struct {
		value  any
		shared bool
	}{
		{opened{}, true},
		{deposited{}, true},
		{closed{}, true},
		{struct {
			ID    uuid.UUID
			At    time.Time
			Parts [3]part
			Rate  float64
			Count json.Number
		}{}, true},
		{struct{ Tags []string }{}, false},
		{struct{ Data json.RawMessage }{}, false},
		{struct{ ByName map[string]int }{}, false},
		{struct{ Any any }{}, false},
		{struct{ hidden []byte }{}, false},
		{struct{ Parts [2]linked }{}, false},
		{struct{ Do func() }{}, false},
		{struct{ Done chan int }{}, false},
		{struct{ Sum big.Int }{}, false},
		{struct{ From netip.Addr }{}, false},
		{&opened{}, false},
	} {
		require.Equal(t, c.shared, projection.Isolated(reflect.TypeOf(c.value)), "%T", c.value)
	}
}

// weighed is decoded by a method that counts.
type weighed struct {
	Grams   int64
	Decoded bool
}

func (weighed) EventType() string { return "parcel.weighed" }

var weighings atomic.Int64

// UnmarshalJSON counts, and refuses what weighs less than nothing.
func (w *weighed) UnmarshalJSON(data []byte) error {
	weighings.Add(1)
	type plain weighed
	if err := json.Unmarshal(data, (*plain)(w)); err != nil {
		return err
	}
	if w.Grams < 0 {
		return fmt.Errorf("%d grams", w.Grams)
	}
	w.Decoded = true
	return nil
}

// packed has parts that copies would share.
type packed struct{ Items []string }

func (packed) EventType() string { return "parcel.packed" }

type parcel struct {
	Grams int64
	Items []string
	Seen  int
}

// countingReads counts the events that subscriptions read.
type countingReads struct {
	backend
	read *atomic.Int64
}

func (c countingReads) Unwrap() eventstore.Store { return c.backend }

func (c countingReads) Subscribe(ctx context.Context, q eventstore.Query, after eventstore.Position) iter.Seq2[eventstore.Batch, error] {
	return func(yield func(eventstore.Batch, error) bool) {
		for b, err := range c.backend.Subscribe(ctx, q, after) {
			c.read.Add(int64(len(b.Events)))
			if !yield(b, err) {
				return
			}
		}
	}
}

// Ten projections read each event once and decode it once, or nearly so. Each
// changes what it is given, and keeps it, and no other one sees that. What one of
// them cannot decode none can, and each sets it aside.
func TestEngine_ProjectionsShare(t *testing.T) {
	const projections, events = 10, 2000
	for name, open := range backends {
		t.Run(name, func(t *testing.T) {
			store := countingReads{open(t), &atomic.Int64{}}
			views := make([]*projection.ViewDefinition[parcel], projections)
			all := make([]projection.Projection, projections)
			names := make([]string, projections)
			for i := range views {
				names[i] = fmt.Sprint("parcels", i)
				views[i] = projection.View(names[i],
					projection.OnKeyed(func(weighed, eventstore.Recorded) []string { return []string{"one", "two"} },
						func(p *parcel, _ string, e weighed, _ eventstore.Recorded) {
							if !e.Decoded {
								panic("it was given what another one has changed")
							}
							e.Decoded = false
							p.Grams += e.Grams
							p.Seen++
						}),
					projection.On(func(p *parcel, e packed) {
						e.Items[0] = fmt.Sprint("label ", i)
						p.Items = e.Items
					}),
				)
				all[i] = views[i]
			}
			r := start(t, store, store, projection.Options{}, all...)
			r.caughtUp(t, store, names...)
			weighings.Store(0)
			store.read.Store(0)
			var writing sync.WaitGroup
			writing.Go(func() {
				for i := range events / 100 {
					batch := make([]projection.Event, 100)
					for k := range batch {
						batch[k] = weighed{Grams: int64(i + k)}
					}
					put(t, store, account(fmt.Sprint("p", i)), batch...)
					put(t, store, account(fmt.Sprint("q", i)), packed{Items: []string{"a", "b"}})
				}
			})
			writing.Wait()
			put(t, store, account("bad"), weighed{Grams: -1})
			r.caughtUp(t, store, names...)
			for i, view := range views {
				got := rows(t, store, view)
				require.Equal(t, events, got["one"].Seen)
				require.Equal(t, got["one"], got["two"])
				require.Equal(t, []string{fmt.Sprint("label ", i), "b"}, got["q3"].Items)
				letters, err := r.DeadLetters(context.Background(), names[i])
				require.NoError(t, err)
				require.Len(t, letters, 1)
				require.Contains(t, letters[0].Error, "-1 grams")
			}
			require.Less(t, weighings.Load(), int64(projections*events/2), "decoded, of %d events for %d projections", events, projections)
			require.Less(t, store.read.Load(), int64(projections*events/2), "read")
			t.Logf("%d events were read, %d decoded", store.read.Load(), weighings.Load())
			require.NoError(t, r.stop())
		})
	}
}
