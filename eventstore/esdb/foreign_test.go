package esdb

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// the receiver's time counts against Patience.
type breaking struct {
	*client
	breakAt int // of events handed out by readers
	seen    int
}
type breakingReader struct {
	driver.Reader
	b *breaking
}

func (b *breaking) ReadStream(ctx context.Context, n string, f driver.StreamFrom, back bool, c uint64) (driver.Reader, error) {
	r, err := b.client.ReadStream(ctx, n, f, back, c)
	return &breakingReader{r, b}, err
}

func (r *breakingReader) Next(ctx context.Context) (*driver.Recorded, error) {
	if r.b.seen == r.b.breakAt {
		r.b.seen++
		return nil, &driver.Error{Kind: driver.Unavailable, Err: errors.New("connection lost once")}
	}
	r.b.seen++
	return r.Reader.Next(ctx)
}

func TestStore_SlowReceiverOfRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // patience runs out by nothing but the receiver's time
		db := newDatabase()
		d := &breaking{client: db.client(), breakAt: -1}
		s, err := Open(t.Context(), "", withDriver(d), Patience(50*time.Millisecond))
		require.NoError(t, err)
		defer s.Close()
		_, err = s.Append(t.Context(), rvCommit(3))
		require.NoError(t, err)
		d.seen, d.breakAt = 0, 1
		n := 0
		for _, err := range s.Read(t.Context(), eventstore.OneStream(rv), eventstore.ReadOptions{Backward: true}) {
			require.NoError(t, err, "after %d", n)
			if n++; n == 1 {
				time.Sleep(100 * time.Millisecond) // the receiver takes longer than Patience
			}
		}
		require.Equal(t, 3, n)
	})
}

// what findEnd has looked through is lost when patience ends.
type slow struct {
	*client
	most int // events of one read before the server is silent
}
type slowReader struct {
	driver.Reader
	left int
}

func (d *slow) ReadAll(ctx context.Context, f driver.AllFrom, back bool, c uint64) (driver.Reader, error) {
	r, err := d.client.ReadAll(ctx, f, back, c)
	return &slowReader{r, d.most}, err
}

func (r *slowReader) Next(ctx context.Context) (*driver.Recorded, error) {
	if r.left--; r.left < 0 {
		select { // slow, but never silent for as long as Patience
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
		}
	}
	return r.Reader.Next(ctx)
}

func TestStore_HeadBehindManyForeignEvents(t *testing.T) {
	db := newDatabase()
	d := &slow{client: db.client(), most: 1 << 30}
	s, err := Open(t.Context(), "", withDriver(d), Patience(500*time.Millisecond))
	require.NoError(t, err)
	defer s.Close()
	for range 60 {
		db.system("other", "thing")
	}
	d.most = 10
	for range 3 {
		if _, err = s.Head(t.Context()); err == nil {
			break
		}
	}
	require.NoError(t, err)
}

// Deleting a stream voids the conditions on it. What the server promises stays:
// the numbering goes on, and no version is given twice.
func TestPoint35_DeletionVoidsConditions(t *testing.T) {
	t.Parallel()
	for name, conditions := range map[string][]eventstore.Condition{
		"none": nil, "exists": {eventstore.StreamExists(rv)}, "must be new": {eventstore.StreamAt(rv, eventstore.Revision{})},
		"the version before": {eventstore.StreamAt(rv, eventstore.Revision{Version: 3})},
	} {
		db := newDatabase()
		remembers, fresh := over(t, db), over(t, db)
		_, err := remembers.Append(t.Context(), rvCommit(3))
		require.NoError(t, err, name)
		_, err = db.client().Delete(t.Context(), "account-ann", driver.Any)
		require.NoError(t, err, name)
		n, err := rvRead(t.Context(), remembers, eventstore.OneStream(rv), eventstore.ReadOptions{})
		require.NoError(t, err, name)
		require.Zero(t, n, name)
		if name == "exists" {
			_, err = fresh.Append(t.Context(), rvCommit(1, conditions...))
			require.ErrorIs(t, err, eventstore.ErrConflict, "whoever has not seen the stream finds it empty")
		}
		r, err := remembers.Append(t.Context(), rvCommit(1, conditions...))
		require.NoError(t, err, name)
		require.Equal(t, uint64(4), r.Revision(rv).Version, name)
		for _, wrong := range []uint64{0, 3} {
			_, err = fresh.Append(t.Context(), rvCommit(1, eventstore.StreamAt(rv, eventstore.Revision{Version: wrong})))
			require.ErrorIs(t, err, eventstore.ErrConflict, "%s: version 4 is there, and only once", name)
		}
	}
}

// Keys are as old as their events: after a deletion they are those that the
// process remembers, if it does.
func TestPoint35_DeletionVoidsKeys(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	c := rvCommit(3)
	c.Key = "k"
	_, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	_, err = db.client().Delete(t.Context(), "account-ann", driver.Any)
	require.NoError(t, err)
	again, err := s.Append(t.Context(), c)
	require.NoError(t, err)
	require.True(t, again.Duplicate, "the process remembers")
	other := over(t, db)
	_, used, err := other.Lookup(t.Context(), rv, "k")
	require.NoError(t, err)
	require.False(t, used)
	r, err := other.Append(t.Context(), c)
	require.NoError(t, err)
	require.False(t, r.Duplicate, "to others it is a new one")
	require.Equal(t, uint64(6), r.Revision(rv).Version)
	_, _, err = over(t, db).Lookup(t.Context(), rv, "other")
	require.ErrorIs(t, err, eventstore.ErrGap, "what was removed may have had the key")
}
