package aggregate

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// decideBoundary decides on the events that match the call's query, and waits
// for the outcome: nothing else of the aggregate is on its way meanwhile.
func (a *activation[S]) decideBoundary(c *call[S]) {
	r := a.runtime
	ctx := r.detach(c.ctx)
	for !c.left() {
		receipt, err, judged, conflict := a.tryBoundary(ctx, c)
		if !conflict {
			c.answer(receipt, err, judged)
			return
		}
		r.count(r.conflicts, 1, a.stream.Category)
		if c.conflicts++; c.conflicts >= r.options.Attempts {
			c.answer(receipt, fmt.Errorf("decided %d times for %q, and each time another writer came first: %w", c.conflicts, a.stream, err), false)
			return
		}
		r.count(r.repeats, 1, a.stream.Category)
		c.land()
	}
}

func (a *activation[S]) tryBoundary(ctx context.Context, c *call[S]) (_ eventstore.Receipt, err error, judged, conflict bool) {
	r := a.runtime
	fail := func(err error) (eventstore.Receipt, error, bool, bool) {
		return eventstore.Receipt{}, err, false, false
	}
	query, state, err := a.boundary(c)
	if err != nil {
		return fail(err)
	}
	// What the read does not find is not there up to here.
	after, err := r.store.Head(ctx)
	if err != nil {
		return fail(fmt.Errorf("read the boundary of %q: %w", a.stream, err))
	}
	seen := eventstore.Receipt{}
	for e, err := range r.store.Read(ctx, query, eventstore.ReadOptions{}) {
		if err == nil {
			err = a.def.fold(r.options.Encoding, &state, &e)
		}
		if err != nil {
			return fail(fmt.Errorf("read the boundary of %q: %w", a.stream, err))
		}
		seen.Last, after = e.Position, max(after, e.Position)
	}
	events, err := a.ask(c, state)
	if err != nil {
		return eventstore.Receipt{}, err, true, false
	}
	if len(events) == 0 {
		return seen, nil, true, false
	}
	encoded, err := a.encode(c, events)
	if err != nil {
		return fail(err)
	}
	for i := range encoded {
		e := recorded(&encoded[i], 0)
		if _, err := a.def.Decode(r.options.Encoding, e); err != nil {
			return fail(fmt.Errorf("event %d of the decision for %q was not written: %w", i, a.stream, err))
		}
	}
	if !c.fly() {
		return fail(c.ctx.Err())
	}
	a.forget() // the stream grows
	commit := eventstore.Commit{Events: encoded, Conditions: []eventstore.Condition{eventstore.NoneMatch(query, after)}, Key: c.req.Key, Fingerprint: c.req.Fingerprint}
	receipt, err := r.result(r.enqueue(c.ctx, commit))
	if isUnknown(err) {
		receipt, err = a.resolveBoundary(commit, after, err)
	}
	return receipt, err, false, errors.Is(err, eventstore.ErrConflict)
}

func (a *activation[S]) boundary(c *call[S]) (query eventstore.Query, initial S, err error) {
	defer caught(&err, func() string { return fmt.Sprintf("Boundary for %q", a.stream) })
	query, initial = c.req.Boundary()
	query.Items = append([]eventstore.Item(nil), query.Items...)
	for i := range query.Items {
		if types := query.Items[i].Types; len(types) > 0 {
			query.Items[i].Types = a.runtime.options.Encoding.StoredTypes(types...)
		}
	}
	return query, initial, query.Validate()
}

// holds reports whether the event is the first that the receipt tells of: with
// a key, the receipt may also be that of the same request in another process.
func (a *activation[S]) holds(receipt eventstore.Receipt, id uuid.UUID) bool {
	o := eventstore.ReadOptions{After: receipt.First - 1, Limit: 1}
	for e, err := range a.runtime.store.Read(a.runtime.life, eventstore.OneStream(a.stream), o) {
		return err == nil && e.ID == id
	}
	return false
}

// resolveBoundary looks for a commit whose outcome is unknown. Nothing but its
// events' ids tells it apart, so it is not appended again: it would be written
// twice if the first one arrived later.
func (a *activation[S]) resolveBoundary(c eventstore.Commit, after eventstore.Position, cause error) (eventstore.Receipt, error) {
	r := a.runtime
	r.count(r.unknowns, 1, a.stream.Category)
	if c.Key != "" {
		receipt, err := r.result(r.enqueue(r.life, c))
		if errors.Is(err, eventstore.ErrUnavailable) {
			// Nothing was written now; what became of the first try is as unknown as before.
			return receipt, errors.Join(cause, err)
		}
		if err == nil && receipt.Duplicate && a.holds(receipt, c.Events[0].ID) {
			receipt.Duplicate = false // the first try was written after all
		}
		return receipt, err
	}
	receipt := eventstore.Receipt{}
	for e, err := range r.store.Read(r.life, eventstore.OneStream(a.stream), eventstore.ReadOptions{After: after}) {
		if err != nil {
			break
		}
		for i := range c.Events {
			if e.ID == c.Events[i].ID {
				if i == 0 {
					receipt.First = e.Position
				}
				receipt.Last = e.Position
				receipt.Revisions = []eventstore.StreamRevision{{Stream: a.stream, Revision: e.Revision()}}
			}
		}
	}
	if receipt.First != 0 {
		return receipt, nil
	}
	return receipt, cause
}
