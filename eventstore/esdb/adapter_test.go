package esdb

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

var ann = eventstore.Stream{Category: "account", ID: "ann"}

func happened(n int) eventstore.Commit {
	var c eventstore.Commit
	for i := range n {
		c.Events = append(c.Events, eventstore.Event{Stream: ann, Type: "happened", Data: fmt.Appendf(nil, `{"N":%d}`, i)})
	}
	return c
}

func over(t *testing.T, db *database, options ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), "", append(options, withDriver(db.client()))...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func all(t *testing.T, s *Store, q eventstore.Query) []eventstore.Recorded {
	t.Helper()
	var got []eventstore.Recorded
	for e, err := range s.Read(t.Context(), q, eventstore.ReadOptions{}) {
		require.NoError(t, err)
		got = append(got, e)
	}
	return got
}

// The stored form of events is kept for ever.
func TestEncode_Golden(t *testing.T) {
	t.Parallel()
	c := eventstore.Commit{
		Events: []eventstore.Event{
			{
				ID: uuid.MustParse("01890a5d-ac96-774b-bcce-b302099a8057"), Stream: ann, Type: "opened", Tags: []string{"a", "b"}, Data: []byte(`{}`),
				Metadata: eventstore.Metadata{CorrelationID: "c1", CausationID: "c0", Actor: "ann", TraceParent: "00-1", SchemaVersion: 2, Codec: "json", Extra: map[string]string{"k": "v"}},
				Time:     time.Date(2026, 2, 28, 23, 59, 59, 123456789, time.UTC),
			},
			{ID: uuid.MustParse("01890a5d-ac96-774b-bcce-b302099a8058"), Stream: ann, Type: "closed", Time: time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)},
		},
		Key: "key", Fingerprint: "print",
	}
	events, err := encode(c, []bool{true, false})
	require.NoError(t, err)
	require.JSONEq(t, `{"deed":1,"time":"2026-02-28T23:59:59.123456789Z","id":"01890a5d-ac96-774b-bcce-b302099a8057","tags":["a","b"],"of":2,"key":"key","fingerprint":"print",
		"$correlationId":"c1","$causationId":"c0","actor":"ann","trace":"00-1","schema":2,"codec":"json","extra":{"k":"v"}}`, string(events[0].Metadata))
	require.JSONEq(t, `{"deed":1,"time":"2026-03-01T00:00:00Z","index":1,"of":2}`, string(events[1].Metadata))
	require.NotEqual(t, c.Events[0].ID, events[0].ID, "an id that was given is not the one on the wire")
	require.Equal(t, c.Events[1].ID, events[1].ID)
	require.True(t, events[0].JSON)
	require.False(t, events[1].JSON, "nothing is no JSON")
}

// What a server hands out is taken for what it is, or refused.
func TestDecode(t *testing.T) {
	t.Parallel()
	s := newStore(defaults())
	good := driver.Recorded{
		ID: uuid.New(), Stream: "account-ann", Revision: 3, Position: driver.Position{Commit: 7, Prepare: 7}, Type: "opened",
		Metadata: []byte(`{"deed":1,"time":"2026-03-01T00:00:00Z","later":"added"}`),
	}
	e, err := s.decode(&good)
	require.NoError(t, err)
	require.Equal(t, eventstore.Revision{Version: 4, Position: 7}, e.Revision())
	require.Equal(t, good.ID, e.ID)
	for name, c := range map[string]struct {
		change func(*driver.Recorded)
		is     error
	}{
		"system type":       {func(r *driver.Recorded) { r.Type = "$metadata" }, errForeign},
		"link":              {func(r *driver.Recorded) { r.Type = "$>" }, errForeign},
		"system stream":     {func(r *driver.Recorded) { r.Stream = "$$account-ann" }, errForeign},
		"other log":         {func(r *driver.Recorded) { r.Stream = "shop:account-ann" }, errForeign},
		"no category":       {func(r *driver.Recorded) { r.Stream = "account" }, errForeign},
		"no metadata":       {func(r *driver.Recorded) { r.Metadata = nil }, errForeign},
		"other metadata":    {func(r *driver.Recorded) { r.Metadata = []byte(`{"time":7}`) }, errForeign},
		"binary metadata":   {func(r *driver.Recorded) { r.Metadata = []byte{0xff} }, errForeign},
		"broken JSON":       {func(r *driver.Recorded) { r.Metadata = []byte(`{"deed":1,`) }, errForeign},
		"newer":             {func(r *driver.Recorded) { r.Metadata = []byte(`{"deed":2,"time":{}}`) }, eventstore.ErrNewerVersion},
		"bad time":          {func(r *driver.Recorded) { r.Metadata = []byte(`{"deed":1,"time":"noon"}`) }, eventstore.ErrDecode},
		"bad id":            {func(r *driver.Recorded) { r.Metadata = []byte(`{"deed":1,"time":"2026-03-01T00:00:00Z","id":"x"}`) }, eventstore.ErrDecode},
		"bad field":         {func(r *driver.Recorded) { r.Metadata = []byte(`{"deed":1,"time":"2026-03-01T00:00:00Z","tags":7}`) }, eventstore.ErrDecode},
		"old transaction":   {func(r *driver.Recorded) { r.Position.Prepare = 5 }, eventstore.ErrGap},
		"no position":       {func(r *driver.Recorded) { r.Position = driver.Position{} }, eventstore.ErrGap},
		"all-ones position": {func(r *driver.Recorded) { r.Position = driver.Position{Commit: 1<<64 - 1, Prepare: 1<<64 - 1} }, eventstore.ErrGap},
	} {
		r := good
		c.change(&r)
		_, err := s.decode(&r)
		require.ErrorIs(t, err, c.is, name)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("account-ann", "opened", []byte(`{"deed":1,"time":"2026-03-01T00:00:00Z"}`))
	f.Add("$$account-ann", "$metadata", []byte(`{"$tb":3}`))
	s := newStore(defaults())
	f.Fuzz(func(t *testing.T, stream, kind string, metadata []byte) {
		r := driver.Recorded{ID: uuid.New(), Stream: stream, Position: driver.Position{Commit: 7, Prepare: 7}, Type: kind, Metadata: metadata}
		e, err := s.decode(&r)
		if err != nil {
			return
		}
		if e.Stream.String() != stream || e.Stream.Validate() != nil || e.of < 1 {
			t.Fatalf("%q was read as %+v", stream, e)
		}
	})
}

// cutAfter makes the next n appends lose their answers after they were written.
func (db *database) cut(before, after int, between func()) {
	var mu sync.Mutex
	lost := func(left *int) error {
		mu.Lock()
		defer mu.Unlock()
		if *left == 0 {
			return nil
		}
		*left--
		if between != nil {
			between()
		}
		return kind(driver.Unavailable, "connection reset")
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	db.before = func(string, driver.Expected, []driver.Event) error { return lost(&before) }
	db.after = func(string, driver.Expected, []driver.Event) error { return lost(&after) }
}

// The answer is lost, and before the commit is sent again another writer has
// written behind it, or before it: the ids that stand at its place decide.
func TestPoint22_RivalBeforeTheAnswerIsKnown(t *testing.T) {
	t.Parallel()
	for name, written := range map[string]bool{"written": true, "not written": false} {
		for _, n := range []int{1, 3} {
			for _, keyed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d/%v", name, n, keyed), func(t *testing.T) {
					t.Parallel()
					db := newDatabase()
					s, rival := over(t, db), over(t, db)
					_, err := s.Append(t.Context(), happened(2))
					require.NoError(t, err)
					c := happened(n)
					c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 2})}
					if keyed {
						c.Key = "k"
					}
					intrude := func() {
						db.mu.Lock()
						db.before, db.after = nil, nil
						db.mu.Unlock()
						_, err := rival.Append(context.Background(), happened(1))
						if err != nil {
							t.Error(err)
						}
					}
					if written {
						db.cut(0, 1, intrude)
					} else {
						db.cut(1, 0, intrude)
					}
					r, err := s.Append(t.Context(), c)
					got := all(t, s, eventstore.OneStream(ann))
					switch {
					case err == nil:
						require.False(t, r.Duplicate)
						require.Equal(t, uint64(2+n), r.Revision(ann).Version)
						require.Equal(t, got[2].Position, r.First)
						require.Equal(t, got[1+n].Position, r.Last)
					case written:
						require.NoError(t, err, "it was written")
					default: // the rival was faster
						require.ErrorIs(t, err, eventstore.ErrConflict)
						require.Len(t, got, 3)
					}
				})
			}
		}
	}
}

// A repetition that the server recognises is answered without a position: the
// receipt has it all the same.
func TestPoint09_RepetitionAnsweredWithoutPosition(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3} {
		db := newDatabase()
		s := over(t, db)
		db.cut(0, 2, nil)
		r, err := s.Append(t.Context(), happened(n))
		require.NoError(t, err)
		got := all(t, s, eventstore.OneStream(ann))
		require.Len(t, got, n)
		require.Equal(t, got[0].Position, r.First)
		require.Equal(t, got[n-1].Position, r.Last)
		require.Equal(t, got[n-1].Revision(), r.Revision(ann))
	}
}

// An outcome that stays unknown is said to be so; the same key then settles it,
// whichever it was.
func TestPoint22_UnknownUntilTheKeyIsUsedAgain(t *testing.T) {
	t.Parallel()
	for _, written := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) { // patience runs out by nothing but pauses
			db := newDatabase()
			s := over(t, db, Patience(50*time.Millisecond))
			_, err := s.Append(t.Context(), happened(1))
			require.NoError(t, err)
			if written {
				db.cut(0, 1_000_000, nil)
			} else {
				db.cut(1_000_000, 0, nil)
			}
			c := happened(2)
			c.Key = "k"
			_, err = s.Append(t.Context(), c)
			require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
			require.True(t, eventstore.CanRetry(err))
			db.cut(0, 0, nil)
			r, err := s.Append(t.Context(), c)
			require.NoError(t, err)
			require.Equal(t, written, r.Duplicate)
			require.Equal(t, uint64(3), r.Revision(ann).Version)
			require.Len(t, all(t, s, eventstore.OneStream(ann)), 3)
		})
	}
}

// What was sent for one commit is the same each time: ids, order, expectation.
func TestPoint22_TheSameIsSentAgain(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	var sent [][]driver.Event
	var expectations []driver.Expected
	db.mu.Lock()
	db.before = func(_ string, expected driver.Expected, events []driver.Event) error {
		sent, expectations = append(sent, events), append(expectations, expected)
		if len(sent) < 5 {
			return kind([]driver.Kind{driver.Unavailable, driver.Aborted, driver.Timeout, driver.Unknown}[len(sent)-1], "lost")
		}
		return nil
	}
	db.mu.Unlock()
	_, err := s.Append(t.Context(), happened(3))
	require.NoError(t, err)
	require.Len(t, sent, 5)
	for i := range sent {
		require.Equal(t, sent[0], sent[i])
		for _, e := range sent[i] {
			require.NotZero(t, e.ID, "the client would make up another one each time")
		}
		require.Equal(t, driver.NoStream, expectations[i], "never any revision: then its outcome could not be found out")
	}
}

// Without a reason, refused is refused: the server never had all of it.
func TestRejectedWithoutAReason(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	db.before = func(string, driver.Expected, []driver.Event) error { return kind(driver.Rejected, "EOF") }
	c := happened(1)
	c.Events[0].Data = make([]byte, 100_000)
	_, err := s.Append(t.Context(), c)
	require.ErrorContains(t, err, "MaxAppendSize")
	require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
	require.False(t, eventstore.CanRetry(err))
	require.Empty(t, all(t, s, eventstore.OneStream(ann)))

	// A small one is not too large for anybody: the connection broke.
	n := 0
	db.mu.Lock()
	db.before = func(string, driver.Expected, []driver.Event) error {
		if n++; n < 8 {
			return kind(driver.Rejected, "EOF")
		}
		return nil
	}
	db.mu.Unlock()
	_, err = s.Append(t.Context(), happened(1))
	require.NoError(t, err)
}

// Two processes use one key at once: one writes, the other gets its receipt,
// although it had looked for the key before.
func TestKeys_OfAnotherProcess(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	a, b := over(t, db), over(t, db)
	_, err := a.Append(t.Context(), happened(1))
	require.NoError(t, err)
	c := happened(2)
	c.Key = "k"
	var first eventstore.Receipt
	once := sync.OnceFunc(func() {
		var err error
		first, err = b.Append(context.Background(), c)
		if err != nil {
			t.Error(err)
		}
	})
	db.mu.Lock()
	db.before = func(string, driver.Expected, []driver.Event) error {
		db.mu.Lock()
		db.before = nil
		db.mu.Unlock()
		once() // between a's look at the stream and its write
		return nil
	}
	db.mu.Unlock()
	again, err := a.Append(t.Context(), c)
	require.NoError(t, err)
	require.True(t, again.Duplicate)
	require.Equal(t, first.Last, again.Last)
	require.Equal(t, first.Revisions, again.Revisions)
	require.Len(t, all(t, a, eventstore.OneStream(ann)), 3)
}

// The tail of the database belongs to the system, and the server says nothing
// about it: head, reads and subscriptions get to their ends all the same.
func TestPoint55_SystemEventsAtTheEnd(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	db.silent = true
	s := over(t, db, Tail(1, 1))
	for range 10 {
		_, err := s.Append(t.Context(), happened(1))
		require.NoError(t, err)
		db.system("$stats-0.0.0.0:2113", "$statsCollected")
		db.system("other", "foreign")
	}
	for range 1000 {
		db.system("$stats-0.0.0.0:2113", "$statsCollected")
	}
	want := all(t, s, eventstore.OneStream(ann))
	require.Len(t, want, 10)
	for range 2 {
		head, err := s.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, want[9].Position, head)
		for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneCategory("account"), eventstore.OneCategory("nothing"), eventstore.OfTypes("happened"), eventstore.OfTypes("nothing"), eventstore.Tagged("nothing")} {
			for _, after := range []eventstore.Position{0, want[3].Position, head} {
				n := 0
				for batch, err := range s.Subscribe(t.Context(), q, after) {
					require.NoError(t, err)
					n += len(batch.Events)
					if batch.Through >= head {
						require.Equal(t, head, batch.Through)
						require.True(t, batch.CaughtUp)
						break
					}
				}
				expected := 0
				for i := range want {
					if want[i].Position > after && q.Matches(&want[i]) {
						expected++
					}
				}
				require.Equal(t, expected, n)
			}
		}
	}
}

// An event that has no position of its own stops readers of the log loudly.
func TestPositionsThatDiffer(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	_, err := s.Append(t.Context(), happened(2))
	require.NoError(t, err)
	db.mu.Lock()
	db.all[len(db.all)-1].Position.Prepare--
	db.mu.Unlock()
	for _, o := range []eventstore.ReadOptions{{}, {Backward: true}} {
		for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneStream(ann)} {
			var last error
			for _, err := range s.Read(t.Context(), q, o) {
				last = err
			}
			require.ErrorIs(t, last, eventstore.ErrGap)
			require.ErrorContains(t, last, "prepare position")
		}
	}
	for _, err := range s.Subscribe(t.Context(), eventstore.All(), 0) {
		if err != nil {
			require.ErrorIs(t, err, eventstore.ErrGap)
		}
	}
}

// Subscriptions that are dropped go on where they were, also in the middle of a
// commit.
func TestPoint56_DroppedAgainAndAgain(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var last eventstore.Position
	var got []eventstore.Recorded
	n := 0
	for batch, err := range s.Subscribe(ctx, eventstore.All(), 0) {
		require.NoError(t, err)
		require.GreaterOrEqual(t, batch.Through, last)
		got = append(got, batch.Events...)
		if batch.Through < last {
			continue
		}
		if n == 50 {
			break
		}
		n++
		db.drop()
		r, err := s.Append(ctx, happened(1+n%3))
		require.NoError(t, err)
		db.drop()
		last = r.Last
	}
	for i, e := range got {
		require.Equal(t, uint64(i+1), e.Version)
	}
	require.Len(t, got, len(all(t, s, eventstore.OneStream(ann))))
	db.mu.Lock()
	defer db.mu.Unlock()
	again := db.subscribed[len(db.subscribed)-1]
	require.False(t, again.Start, "what was handled is not asked for again")
	require.Greater(t, again.Position.Commit, uint64(got[len(got)/2].Position))
}

// The store's memory of streams is bounded and never needed.
func TestStreams_AreForgotten(t *testing.T) {
	t.Parallel()
	s := newStreams()
	for i := range mostStreams + 100 {
		k, err := s.take(t.Context(), eventstore.Stream{Category: "a", ID: fmt.Sprint(i)})
		require.NoError(t, err)
		k.keys["k"] = eventstore.Receipt{}
		s.give(k)
	}
	require.LessOrEqual(t, len(s.all), mostStreams)
	require.Equal(t, len(s.all), s.keys)
	require.Equal(t, len(s.all), s.used.Len())
	require.Nil(t, s.all[eventstore.Stream{Category: "a", ID: "0"}], "the one used longest ago")
	k, err := s.take(t.Context(), ann)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.take(ctx, ann)
	require.ErrorIs(t, err, context.Canceled)
	s.give(k)
}

func TestOptions_AreChecked(t *testing.T) {
	t.Parallel()
	_, err := Open(t.Context(), "esdb://localhost:1?tls=false", Prefix("a-b"), Patience(0), MaxAppend(1), Tail(0, 0), Now(nil), Logger(nil))
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	for _, part := range []string{`"a-b"`, "patience", "4096", "tail", "clock", "logger"} {
		require.ErrorContains(t, err, part)
	}
	for _, url := range []string{"", "postgres://x", "esdb://", "esdb://localhost:port"} {
		_, err := Open(t.Context(), url)
		require.ErrorIs(t, err, eventstore.ErrInvalid, "%q", url)
	}
	s := over(t, newDatabase())
	require.True(t, s.Shared())
	c := happened(1)
	c.Events[0].Type = "$mine"
	_, err = s.Append(t.Context(), c)
	require.ErrorIs(t, err, eventstore.ErrInvalid)
	require.ErrorContains(t, err, "$mine")
	c = happened(1)
	c.Conditions = []eventstore.Condition{eventstore.NoneMatch(eventstore.All(), 0)}
	_, err = s.Append(t.Context(), c)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// The id of a log is given once, and survives whoever opens it at the same time.
func TestLogID(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	const openers = 8
	ids := make([]string, openers)
	var group sync.WaitGroup
	for i := range openers {
		group.Go(func() {
			s, err := Open(context.Background(), "", withDriver(db.client()))
			if err != nil {
				t.Error(err)
				return
			}
			ids[i], _ = s.LogID(context.Background())
			_ = s.Close()
		})
	}
	group.Wait()
	for _, id := range ids {
		require.Equal(t, ids[0], id)
	}
	other := over(t, db, Prefix("other"))
	id, err := other.LogID(t.Context())
	require.NoError(t, err)
	require.NotEqual(t, ids[0], id)
	db.mu.Lock()
	db.all[db.streams["deed:log"].events[0]].Data = []byte(`{"id":7}`)
	db.mu.Unlock()
	_, err = Open(t.Context(), "", withDriver(db.client()))
	require.ErrorIs(t, err, eventstore.ErrDecode)
}

// A write that has waited for the turn of its stream has its whole patience left
// to find out what became of it.
func TestPoint22_WaitingForTheTurnCostsNoPatience(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		db := newDatabase()
		s, err := Open(t.Context(), "", withDriver(db.client()))
		require.NoError(t, err)
		began := time.Now()
		holding := make(chan struct{})
		hold := sync.OnceFunc(func() {
			close(holding)
			time.Sleep(9 * time.Second) // less than one attempt may take
		})
		db.mu.Lock()
		db.before = func(_ string, _ driver.Expected, events []driver.Event) error {
			if events[0].Type == "first" {
				hold()
			}
			return nil
		}
		db.after = func(string, driver.Expected, []driver.Event) error {
			if time.Since(began) < 14*time.Second {
				return kind(driver.Unavailable, "connection reset")
			}
			return nil
		}
		s.settings.patience = 10 * time.Second
		db.mu.Unlock()
		var group sync.WaitGroup
		group.Go(func() {
			first := happened(1)
			first.Events[0].Type = "first"
			_, err := s.Append(t.Context(), first)
			if !errors.Is(err, eventstore.ErrOutcomeUnknown) {
				t.Errorf("the first: %v", err)
			}
		})
		<-holding
		time.Sleep(time.Second) // of the bubble's: the first one's patience ends before that of the second
		r, err := s.Append(t.Context(), happened(1))
		require.NoError(t, err, "its time was spent on waiting for another")
		require.Equal(t, uint64(2), r.Revision(ann).Version)
		group.Wait()
		require.NoError(t, s.Close())
	})
}
