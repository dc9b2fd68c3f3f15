package esdb

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// R4: the receiver's time counts against Patience.
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
}

// R6: what findEnd has looked through is lost when patience ends.
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

// R15: remembered streams and soft deletion.
func TestStore_SoftDeletedStreamExists(t *testing.T) {
	db := newDatabase()
	c := db.client()
	s, err := Open(t.Context(), "", withDriver(c))
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Append(t.Context(), rvCommit(3))
	require.NoError(t, err)
	_, err = c.Delete(t.Context(), "account-ann", driver.Any)
	require.NoError(t, err)
	n, err := rvRead(t.Context(), s, eventstore.OneStream(rv), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Zero(t, n)
	r, err := s.Append(t.Context(), rvCommit(1, eventstore.StreamExists(rv)))
	t.Log(r, err)
	require.ErrorIs(t, err, eventstore.ErrConflict)
}

func TestStore_DeletedVersionPasses(t *testing.T) {
	db := newDatabase()
	c := db.client()
	s, err := Open(t.Context(), "", withDriver(c))
	require.NoError(t, err)
	defer s.Close()
	r, err := s.Append(t.Context(), rvCommit(3))
	require.NoError(t, err)
	_, err = c.Delete(t.Context(), "account-ann", driver.Any)
	require.NoError(t, err)
	r, err = s.Append(t.Context(), rvCommit(1, eventstore.StreamAt(rv, r.Revision(rv))))
	t.Log(r, err)
	require.Error(t, err)
}

// cached keys of deleted events
func TestStore_DeletedKeys(t *testing.T) {
	db := newDatabase()
	c := db.client()
	s, err := Open(t.Context(), "", withDriver(c))
	require.NoError(t, err)
	defer s.Close()
	cm := rvCommit(3)
	cm.Key = "k"
	_, err = s.Append(t.Context(), cm)
	require.NoError(t, err)
	_, err = c.Delete(t.Context(), "account-ann", driver.Any)
	require.NoError(t, err)
	_, ok, err := s.Lookup(t.Context(), rv, "k")
	t.Log("cached", ok, err)
	other, err := Open(t.Context(), "", withDriver(db.client()))
	require.NoError(t, err)
	defer other.Close()
	r, err := other.Append(t.Context(), rvCommit(1))
	t.Log(r, err)
	r, err = s.Append(t.Context(), cm)
	t.Log(r, err)
	cm.Key = "k2"
	r, err = s.Append(t.Context(), cm)
	t.Log(r, err)
	_, ok, err = other.Lookup(t.Context(), rv, "k")
	t.Log("other", ok, err)
	_ = uuid.Nil
}
