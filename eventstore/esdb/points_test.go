package esdb_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
	"github.com/deed-go/deed/eventstore/esdb/internal/eventstoredb"
)

// The points are those of the project's notes on what a server does; each test
// names its own. They hold the driver, and where it decides the adapter, against
// a server.

func connect(t testing.TB, url string) *eventstoredb.Driver {
	t.Helper()
	d, err := eventstoredb.New(url, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

// bench is a driver, a store over the same log, and a stream's name of the test's
// own.
type bench struct {
	t       *testing.T
	ctx     context.Context
	driver  *eventstoredb.Driver
	store   *esdb.Store
	prefix  string
	stream  eventstore.Stream
	name    string
	options []esdb.Option
	url     string
}

func setup(t *testing.T) *bench {
	t.Helper()
	t.Parallel()
	at, _ := url(t)
	prefix := "t" + strings.ReplaceAll(uuid.NewString(), "-", "")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	b := &bench{t: t, ctx: ctx, driver: connect(t, at), prefix: prefix, stream: eventstore.Stream{Category: "account", ID: "ann"}, url: at, options: []esdb.Option{esdb.Prefix(prefix)}}
	b.name = prefix + ":" + b.stream.String()
	b.store = open(t, at, b.options...)
	return b
}

func (b *bench) events(n int) []driver.Event {
	all := make([]driver.Event, n)
	for i := range all {
		all[i] = driver.Event{ID: uuid.New(), Type: "happened", JSON: true, Data: fmt.Appendf(nil, `{"N":%d}`, i), Metadata: []byte(`{}`)}
	}
	return all
}

func (b *bench) append(expected driver.Expected, e []driver.Event) driver.Appended {
	b.t.Helper()
	a, err := b.driver.Append(b.ctx, b.name, expected, e)
	require.NoError(b.t, err)
	return a
}

func (b *bench) refused(kind driver.Kind, expected driver.Expected, e []driver.Event) {
	b.t.Helper()
	_, err := b.driver.Append(b.ctx, b.name, expected, e)
	require.Error(b.t, err)
	require.Equal(b.t, kind, driver.KindOf(err), "%v", err)
}

func (b *bench) read(from driver.StreamFrom, backward bool, count uint64) ([]driver.Recorded, error) {
	r, err := b.driver.ReadStream(b.ctx, b.name, from, backward, count)
	require.NoError(b.t, err)
	return drain(b.ctx, r)
}

func drain(ctx context.Context, r driver.Reader) ([]driver.Recorded, error) {
	defer r.Close()
	var all []driver.Recorded
	for {
		e, err := r.Next(ctx)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, *e)
	}
}

func (b *bench) revisions(from driver.StreamFrom, backward bool, count uint64) []uint64 {
	b.t.Helper()
	all, err := b.read(from, backward, count)
	require.NoError(b.t, err)
	var revisions []uint64
	for _, e := range all {
		revisions = append(revisions, e.Revision)
	}
	return revisions
}

var start, end = driver.StreamFrom{Start: true}, driver.StreamFrom{End: true}

func at(revision uint64) driver.StreamFrom { return driver.StreamFrom{Revision: revision} }

// deed returns n events for the store.
func (b *bench) deed(n int) []eventstore.Event {
	all := make([]eventstore.Event, n)
	for i := range all {
		all[i] = eventstore.Event{Stream: b.stream, Type: "happened", Data: fmt.Appendf(nil, `{"N":%d}`, i)}
	}
	return all
}

func (b *bench) commit(n int, conditions ...eventstore.Condition) (eventstore.Receipt, error) {
	return b.store.Append(b.ctx, eventstore.Commit{Events: b.deed(n), Conditions: conditions})
}

func (b *bench) must(n int, conditions ...eventstore.Condition) eventstore.Receipt {
	b.t.Helper()
	r, err := b.commit(n, conditions...)
	require.NoError(b.t, err)
	return r
}

func collect(store eventstore.Store, ctx context.Context, q eventstore.Query, o eventstore.ReadOptions) ([]eventstore.Recorded, error) {
	var all []eventstore.Recorded
	for e, err := range store.Read(ctx, q, o) {
		if err != nil {
			return all, err
		}
		all = append(all, e)
	}
	return all, nil
}

func TestPoint01to03_NewStreamRevisionsPositions(t *testing.T) {
	b := setup(t)
	first := b.append(driver.NoStream, b.events(1))
	require.Zero(t, first.Revision)
	second := b.append(0, b.events(5))
	require.Equal(t, uint64(5), second.Revision, "the revision of the last event")
	require.Greater(t, second.Position.Commit, first.Position.Commit)
	require.Equal(t, []uint64{0, 1, 2, 3, 4, 5}, b.revisions(start, false, 100))
}

func TestPoint04_08_WrongRevisionsAreConflicts(t *testing.T) {
	b := setup(t)
	b.append(driver.NoStream, b.events(2))
	for _, wrong := range []driver.Expected{0, 2, 7, driver.NoStream} {
		b.refused(driver.WrongVersion, wrong, b.events(1))
	}
	b.append(1, b.events(1))
}

func TestPoint05to07_StreamExists(t *testing.T) {
	b := setup(t)
	b.refused(driver.WrongVersion, driver.StreamExists, b.events(1))
	require.NoError(t, b.driver.SetMetadata(b.ctx, b.name, driver.Any, []byte(`{"owner":"ann"}`)))
	b.append(driver.StreamExists, b.events(1))
	_, err := b.driver.Delete(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	b.refused(driver.Deleted, driver.StreamExists, b.events(1))
}

func TestPoint09to12_RepeatedIDsAreAnsweredAsSuccess(t *testing.T) {
	b := setup(t)
	batch := b.events(3)
	first := b.append(driver.NoStream, batch)
	again := b.append(driver.NoStream, batch)
	require.Equal(t, first.Revision, again.Revision)
	require.Equal(t, uint64(1), b.append(driver.NoStream, batch[:2]).Revision, "a prefix of what was written")
	b.refused(driver.WrongVersion, driver.NoStream, append(batch[:3:3], b.events(1)...))
	b.append(driver.Any, batch)
	require.Len(t, b.revisions(start, false, 100), 3, "nothing was written again")
}

// The server's answer to a repetition must not make a success of a conflict:
// two commits with the same event ids are two commits.
func TestPoint09_SameEventIDsStillConflict(t *testing.T) {
	b := setup(t)
	c := eventstore.Commit{Events: b.deed(2), Conditions: []eventstore.Condition{eventstore.StreamAt(b.stream, eventstore.Revision{})}}
	for i := range c.Events {
		c.Events[i].ID = uuid.Must(uuid.NewV7())
	}
	first, err := b.store.Append(b.ctx, c)
	require.NoError(t, err)
	for _, store := range []*esdb.Store{b.store, open(t, b.url, b.options...)} {
		_, err = store.Append(b.ctx, c)
		conflict, ok := errors.AsType[*eventstore.ConflictError](err)
		require.True(t, ok, "the stream is at version 2, not 0: %v", err)
		require.Equal(t, first.Revision(b.stream), conflict.Actual)
	}
	c.Conditions = nil
	second, err := b.store.Append(b.ctx, c)
	require.NoError(t, err)
	require.False(t, second.Duplicate)
	require.Equal(t, uint64(4), second.Revision(b.stream).Version, "without condition and key it is written again")
	got, err := collect(b.store, b.ctx, eventstore.OneStream(b.stream), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, got, 4)
	for i, e := range got {
		require.Equal(t, c.Events[i%2].ID, e.ID, "the ids are those that were given")
	}
}

func TestPoint14to16_IDsAreNotUnique(t *testing.T) {
	b := setup(t)
	e := b.events(1)
	b.append(driver.NoStream, e)
	require.Equal(t, uint64(1), b.append(0, e).Revision, "the id was used before, at another revision")
	_, err := b.driver.Append(b.ctx, b.name+"2", driver.NoStream, e)
	require.NoError(t, err, "the id was used before, in another stream")
	six := []driver.Event{e[0], e[0], e[0], e[0], e[0], e[0]}
	b.name += "3"
	require.Equal(t, uint64(5), b.append(driver.NoStream, six).Revision)
	require.Equal(t, uint64(5), b.append(driver.NoStream, six).Revision)
}

func TestPoint17_NothingToAppendIsNeverSent(t *testing.T) {
	b := setup(t)
	_, err := b.driver.Append(b.ctx, b.name, driver.Any, nil)
	require.Error(t, err)
	require.True(t, driver.Unsent(err))
	_, err = b.store.Append(b.ctx, eventstore.Commit{})
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	_, err = b.read(start, false, 1)
	require.Equal(t, driver.NotFound, driver.KindOf(err))
}

func TestPoint18_TooLargeIsRefusedBeforeItIsSent(t *testing.T) {
	b := setup(t)
	half := make([]byte, 600<<10)
	c := eventstore.Commit{Events: b.deed(2)}
	c.Events[0].Data, c.Events[1].Data = half, half
	_, err := b.store.Append(b.ctx, c)
	require.ErrorIs(t, err, eventstore.ErrTooLarge)
	require.ErrorContains(t, err, "at most 1048576")
	require.False(t, eventstore.CanRetry(err))
	// A server that takes less than it is thought to is told from other failures,
	// and has written nothing.
	generous := open(t, b.url, append(b.options, esdb.MaxAppend(16<<20))...)
	c.Events = b.deed(20)
	for i := range c.Events {
		c.Events[i].Data = half
	}
	_, err = generous.Append(b.ctx, c)
	require.Error(t, err)
	require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
	require.False(t, eventstore.CanRetry(err))
	got, err := collect(b.store, b.ctx, eventstore.OneStream(b.stream), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Empty(t, got)
}

func TestPoint19to21_ContentsSurvive(t *testing.T) {
	b := setup(t)
	bytes := []byte{0, 255, 1, 254}
	b.append(driver.NoStream, []driver.Event{
		{ID: uuid.New(), Type: "json", JSON: true, Data: []byte(`{"a":1}`), Metadata: []byte(strings.Repeat("m", 100_000))},
		{ID: uuid.New(), Type: "binary", Data: bytes, Metadata: bytes},
		{ID: uuid.New(), Type: "empty"},
	})
	got, err := b.read(start, false, 10)
	require.NoError(t, err)
	require.True(t, got[0].JSON)
	require.Len(t, got[0].Metadata, 100_000)
	require.False(t, got[1].JSON)
	require.Equal(t, bytes, got[1].Data)
	require.Equal(t, bytes, got[1].Metadata)
	require.Empty(t, got[2].Data)
}

// What is marked as JSON is JSON, whatever the codec's name says.
func TestPoint20_TheAdapterMarksJSON(t *testing.T) {
	b := setup(t)
	c := eventstore.Commit{Events: b.deed(3)}
	c.Events[1].Data = []byte{0xff}
	c.Events[2].Metadata.Codec = "proto"
	_, err := b.store.Append(b.ctx, c)
	require.NoError(t, err)
	got, err := b.read(start, false, 10)
	require.NoError(t, err)
	require.Equal(t, []bool{true, false, false}, []bool{got[0].JSON, got[1].JSON, got[2].JSON})
}

func TestPoint23to26_ReadsOfAStream(t *testing.T) {
	b := setup(t)
	b.append(driver.NoStream, b.events(5))
	require.Equal(t, []uint64{0, 1, 2}, b.revisions(start, false, 3))
	require.Equal(t, []uint64{0, 1, 2, 3, 4}, b.revisions(start, false, 5))
	require.Equal(t, []uint64{4, 3}, b.revisions(end, true, 2))
	require.Equal(t, []uint64{2, 1, 0}, b.revisions(at(2), true, 9))
	require.Equal(t, []uint64{3, 4}, b.revisions(at(3), false, 9))
	require.Empty(t, b.revisions(at(9), false, 9))
	require.Equal(t, []uint64{4}, b.revisions(at(9), true, 1))
}

func TestPoint27to28_30_MissingAndTombstoned(t *testing.T) {
	b := setup(t)
	for _, backward := range []bool{false, true} {
		_, err := b.read(driver.StreamFrom{Start: !backward, End: backward}, backward, 1)
		require.Equal(t, driver.NotFound, driver.KindOf(err))
	}
	b.append(driver.NoStream, b.events(1))
	r, err := b.driver.ReadStream(b.ctx, b.name, start, false, 1)
	require.NoError(t, err)
	_, err = r.Next(b.ctx)
	require.NoError(t, err)
	for range 3 {
		_, err = r.Next(b.ctx)
		require.ErrorIs(t, err, io.EOF)
	}
	_, err = b.driver.Tombstone(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	for _, backward := range []bool{false, true} {
		_, err := b.read(driver.StreamFrom{Start: !backward, End: backward}, backward, 1)
		require.Equal(t, driver.Deleted, driver.KindOf(err))
	}
}

func TestPoint33_50_LinksAndSystemEventsAreSkipped(t *testing.T) {
	b := setup(t)
	r := b.must(1)
	link := driver.Event{ID: uuid.New(), Type: "$>", Data: []byte("0@" + b.name)}
	_, err := b.driver.Append(b.ctx, b.prefix+":other-x", driver.Any, []driver.Event{link})
	require.NoError(t, err)
	require.NoError(t, b.driver.SetMetadata(b.ctx, b.name, driver.Any, []byte(`{"owner":"ann"}`)))
	head, err := b.store.Head(b.ctx)
	require.NoError(t, err)
	require.Equal(t, r.Last, head, "what is not of the log does not move its head")
	for _, back := range []bool{false, true} {
		got, err := collect(b.store, b.ctx, eventstore.All(), eventstore.ReadOptions{Backward: back})
		require.NoError(t, err)
		require.Len(t, got, 1)
	}
	for batch, err := range b.store.Subscribe(b.ctx, eventstore.All(), 0) {
		require.NoError(t, err)
		if batch.Through >= head {
			break
		}
	}
}

// Events of other programs in streams that look like the log's: the log as a
// whole passes over them, the stream is refused, since its versions have holes.
func TestForeignEvents(t *testing.T) {
	b := setup(t)
	b.must(1)
	b.append(0, b.events(1))
	_, err := b.commit(1)
	require.ErrorIs(t, err, eventstore.ErrGap, "a look at the end of the stream finds a foreign event")
	r := b.must(1, eventstore.StreamAt(b.stream, eventstore.Revision{Version: 2}))
	require.Equal(t, uint64(3), r.Revision(b.stream).Version)
	got, err := collect(b.store, b.ctx, eventstore.OneCategory("account"), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, got, 2)
	for _, o := range []eventstore.ReadOptions{{}, {Backward: true}} {
		_, err = collect(b.store, b.ctx, eventstore.OneStream(b.stream), o)
		require.ErrorIs(t, err, eventstore.ErrGap)
		require.ErrorContains(t, err, "not written by deed")
	}
}

func TestPoint34to38_SoftDeletion(t *testing.T) {
	b := setup(t)
	last := b.append(driver.NoStream, b.events(3))
	deleted, err := b.driver.Delete(b.ctx, b.name, 2)
	require.NoError(t, err)
	require.Greater(t, deleted.Commit, last.Position.Commit)
	_, err = b.read(start, false, 1)
	require.Equal(t, driver.NotFound, driver.KindOf(err))
	require.Equal(t, uint64(3), b.append(driver.NoStream, b.events(1)).Revision, "the numbering goes on")
	b.refused(driver.WrongVersion, driver.NoStream, b.events(1))
	require.Equal(t, []uint64{3}, b.revisions(start, false, 9))
	metadata, err := b.driver.Metadata(b.ctx, b.name)
	require.NoError(t, err)
	var fields map[string]json.Number
	require.NoError(t, json.Unmarshal(metadata, &fields))
	require.Equal(t, json.Number("3"), fields["$tb"])
}

// To deed a deleted stream is empty. What is then written to it is written, under
// the versions that follow, but the stream cannot be loaded: its beginning is
// missing.
func TestPoint35_DeletedStreamWrittenAgain(t *testing.T) {
	b := setup(t)
	b.must(3)
	_, err := b.driver.Delete(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	for _, store := range []*esdb.Store{b.store, open(t, b.url, b.options...)} {
		got, err := collect(store, b.ctx, eventstore.OneStream(b.stream), eventstore.ReadOptions{})
		require.NoError(t, err)
		require.Empty(t, got)
	}
	r, err := b.commit(2, eventstore.StreamAt(b.stream, eventstore.Revision{}))
	require.NoError(t, err)
	require.Equal(t, uint64(5), r.Revision(b.stream).Version)
	for _, o := range []eventstore.ReadOptions{{}, {Backward: true}} {
		_, err = collect(b.store, b.ctx, eventstore.OneStream(b.stream), o)
		require.ErrorIs(t, err, eventstore.ErrGap)
	}
	_, _, err = open(t, b.url, b.options...).Lookup(b.ctx, b.stream, "k")
	require.ErrorIs(t, err, eventstore.ErrGap, "the key could be one of the deleted events'")
	all, err := collect(b.store, b.ctx, eventstore.All(), eventstore.ReadOptions{})
	require.NoError(t, err)
	require.Len(t, all, 5, "until the server scavenges, the log as a whole still has what was deleted")
}

func TestPoint39to43_Tombstones(t *testing.T) {
	b := setup(t)
	b.append(driver.NoStream, b.events(1))
	_, err := b.driver.Delete(b.ctx, b.name, 7)
	require.Equal(t, driver.WrongVersion, driver.KindOf(err), "%v", err)
	_, err = b.driver.Tombstone(b.ctx, b.name, 7)
	require.Equal(t, driver.WrongVersion, driver.KindOf(err), "%v", err)
	_, err = b.driver.Delete(b.ctx, b.name, 0)
	require.NoError(t, err)
	_, err = b.driver.Tombstone(b.ctx, b.name, driver.Any)
	require.NoError(t, err, "a soft-deleted stream can be tombstoned")
	_, err = b.driver.Tombstone(b.ctx, b.name, driver.Any)
	require.Equal(t, driver.Deleted, driver.KindOf(err), "%v", err)
	for _, expected := range []driver.Expected{driver.Any, driver.NoStream, 0, driver.StreamExists} {
		b.refused(driver.Deleted, expected, b.events(1))
	}
	_, err = b.driver.Tombstone(b.ctx, b.name+"new", driver.NoStream)
	require.NoError(t, err, "a missing stream can be tombstoned")
}

func TestPoint41_TombstonedStreamIsRefused(t *testing.T) {
	b := setup(t)
	b.must(2)
	_, err := b.driver.Tombstone(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	_, err = b.commit(1)
	require.ErrorIs(t, err, eventstore.ErrGap)
	require.ErrorContains(t, err, "tombstoned")
	require.False(t, eventstore.CanRetry(err))
	_, err = b.commit(1, eventstore.StreamAt(b.stream, eventstore.Revision{Version: 2}))
	require.ErrorIs(t, err, eventstore.ErrGap)
	for _, o := range []eventstore.ReadOptions{{}, {Backward: true}} {
		_, err = collect(b.store, b.ctx, eventstore.OneStream(b.stream), o)
		require.ErrorIs(t, err, eventstore.ErrGap)
	}
	got, err := collect(b.store, b.ctx, eventstore.All(), eventstore.ReadOptions{})
	require.NoError(t, err, "the log as a whole can be read")
	require.Len(t, got, 2)
}

func TestPoint44to46_TruncatedStreamIsRefused(t *testing.T) {
	for name, metadata := range map[string]string{"maxCount": `{"$maxCount":2}`, "tb": `{"$tb":3}`} {
		t.Run(name, func(t *testing.T) {
			b := setup(t)
			r := b.must(3)
			b.must(2)
			require.NoError(t, b.driver.SetMetadata(b.ctx, b.name, driver.Any, []byte(metadata)))
			require.Equal(t, []uint64{3, 4}, b.revisions(start, false, 9))
			for _, o := range []eventstore.ReadOptions{{}, {Backward: true}, {Limit: 1}} {
				got, err := collect(b.store, b.ctx, eventstore.OneStream(b.stream), o)
				if o.Backward {
					require.Len(t, got, 2)
				} else {
					require.Empty(t, got, "a part of a stream must not be taken for all of it")
				}
				require.ErrorIs(t, err, eventstore.ErrGap)
			}
			// After the missing events nothing is missing; but the last one before is needed
			// to know that.
			_, err := collect(b.store, b.ctx, eventstore.OneStream(b.stream), eventstore.ReadOptions{After: r.Last})
			require.ErrorIs(t, err, eventstore.ErrGap)
			got, err := collect(b.store, b.ctx, eventstore.All(), eventstore.ReadOptions{})
			require.NoError(t, err)
			require.Len(t, got, 5, "46: the log as a whole has them until the server scavenges")
			_, err = b.store.Append(b.ctx, eventstore.Commit{Events: b.deed(1), Key: "k"})
			require.NoError(t, err, "this store has seen all keys")
			_, err = open(t, b.url, b.options...).Append(b.ctx, eventstore.Commit{Events: b.deed(1), Key: "k"})
			require.ErrorIs(t, err, eventstore.ErrGap, "this one has not")
		})
	}
}

func TestPoint48to49_All(t *testing.T) {
	b := setup(t)
	first, second := b.append(driver.NoStream, b.events(1)), b.append(0, b.events(1))
	read := func(from driver.AllFrom, backward bool, count uint64) []driver.Recorded {
		r, err := b.driver.ReadAll(b.ctx, from, backward, count)
		require.NoError(t, err)
		all, err := drain(b.ctx, r)
		require.NoError(t, err)
		return all
	}
	require.Empty(t, read(driver.AllFrom{End: true}, false, 1))
	require.Empty(t, read(driver.AllFrom{Start: true}, true, 1))
	require.Equal(t, second.Position, read(driver.AllFrom{Position: second.Position}, false, 1)[0].Position, "forward is inclusive")
	before := read(driver.AllFrom{Position: second.Position}, true, math.MaxInt32)
	require.Less(t, before[0].Position.Commit, second.Position.Commit, "backward is exclusive")
	require.GreaterOrEqual(t, before[0].Position.Commit, first.Position.Commit)
}

func TestPoint51_53_57_58_61_SubscriptionsToAStream(t *testing.T) {
	b := setup(t)
	a, err := b.driver.SubscribeStream(b.ctx, b.name, start)
	require.NoError(t, err)
	defer a.Close()
	next := func(s driver.Subscription) (uint64, error) {
		for {
			m, err := s.Next(b.ctx)
			if err != nil {
				return 0, err
			}
			if m.Event != nil {
				return m.Event.Revision, nil
			}
		}
	}
	b.append(driver.NoStream, b.events(3))
	later, err := b.driver.SubscribeStream(b.ctx, b.name, at(1))
	require.NoError(t, err)
	for want := range uint64(3) {
		got, err := next(a)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	got, err := next(later)
	require.NoError(t, err)
	require.Equal(t, uint64(2), got, "the revision is exclusive")
	later.Close()
	_, err = next(later)
	require.Error(t, err, "61: closing ends it")
	_, err = b.driver.Tombstone(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	_, err = next(a)
	for err == nil { // the tombstone itself may be told
		_, err = next(a)
	}
	require.Equal(t, driver.Deleted, driver.KindOf(err), "57: %v", err)
}

func TestPoint52_59_FilteredSubscriptionIsExclusive(t *testing.T) {
	b := setup(t)
	b.append(driver.NoStream, b.events(1))
	from := b.append(0, b.events(1))
	want := b.append(1, b.events(1))
	s, err := b.driver.SubscribeAll(b.ctx, driver.AllFrom{Position: from.Position}, driver.Filter{StreamPrefixes: []string{b.prefix}})
	require.NoError(t, err)
	defer s.Close()
	for {
		m, err := s.Next(b.ctx)
		require.NoError(t, err)
		if m.Event != nil {
			require.Equal(t, want.Position, m.Event.Position)
			return
		}
	}
}

// A position that no event has is none that a server can begin at.
func TestPositionsThatNobodyGave(t *testing.T) {
	b := setup(t)
	var all []eventstore.Position
	for range 5 {
		all = append(all, b.must(1).Last)
	}
	for _, store := range []*esdb.Store{b.store, open(t, b.url, b.options...)} {
		for i, p := range all {
			for _, after := range []eventstore.Position{p - 1, p, p + 1} {
				want := len(all) - i - 1
				if after < p {
					want++
				}
				got, err := collect(store, b.ctx, eventstore.All(), eventstore.ReadOptions{After: after})
				require.NoError(t, err)
				require.Len(t, got, want)
				if after > all[len(all)-1] {
					continue // a subscription would wait
				}
				n := 0
				for batch, err := range store.Subscribe(b.ctx, eventstore.OneCategory("account"), after) {
					require.NoError(t, err)
					if n += len(batch.Events); batch.Through >= all[len(all)-1] {
						break
					}
				}
				require.Equal(t, want, n)
			}
		}
	}
}

// To deed a stream exists when it has events: one with metadata alone, or a
// deleted one, does not, whatever the server says of it.
func TestPoint06_07_ExistsIsJudgedByEvents(t *testing.T) {
	b := setup(t)
	exists, isNew := eventstore.StreamExists(b.stream), eventstore.StreamAt(b.stream, eventstore.Revision{})
	_, err := b.commit(1, exists)
	require.ErrorIs(t, err, eventstore.ErrConflict, "5: a missing one")
	require.NoError(t, b.driver.SetMetadata(b.ctx, b.name, driver.Any, []byte(`{"owner":"ann"}`)))
	_, err = b.commit(1, exists)
	require.ErrorIs(t, err, eventstore.ErrConflict, "6: one with metadata alone")
	require.Equal(t, uint64(1), b.must(1, isNew).Revision(b.stream).Version)
	require.Equal(t, uint64(2), b.must(1, exists).Revision(b.stream).Version)
	_, err = b.driver.Delete(b.ctx, b.name, driver.Any)
	require.NoError(t, err)
	_, err = open(t, b.url, b.options...).Append(b.ctx, eventstore.Commit{Events: b.deed(1), Conditions: []eventstore.Condition{exists}})
	require.ErrorIs(t, err, eventstore.ErrConflict, "7: a deleted one")
	require.Equal(t, uint64(3), b.must(1, isNew).Revision(b.stream).Version, "35: the numbering goes on")
}

// A tombstone ends the server's subscription to the stream; those of a store have
// the whole log below them, and go on.
func TestPoint57_SubscriptionsOutliveATombstone(t *testing.T) {
	b := setup(t)
	b.must(2)
	other := eventstore.Stream{Category: "account", ID: "bob"}
	counts := map[string]int{}
	gone := false
	for batch, err := range b.store.Subscribe(b.ctx, eventstore.OneCategory("account"), 0) {
		require.NoError(t, err)
		for _, e := range batch.Events {
			counts[e.Stream.ID]++
		}
		if counts["ann"] == 2 && !gone {
			gone = true
			_, err := b.driver.Tombstone(b.ctx, b.name, driver.Any)
			require.NoError(t, err)
			_, err = b.store.Append(b.ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: other, Type: "happened"}}})
			require.NoError(t, err)
		}
		if counts["bob"] == 1 {
			break
		}
	}
	require.Equal(t, map[string]int{"ann": 2, "bob": 1}, counts)
	for batch, err := range b.store.Subscribe(b.ctx, eventstore.OneStream(b.stream), 0) {
		require.NoError(t, err, "nor does it hinder one that begins later")
		if batch.CaughtUp {
			break
		}
	}
}
