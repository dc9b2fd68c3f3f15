package esdb

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// behind is a node that follows and has nothing yet: it answers reads of streams,
// but not those that ask for the leader.
type behind struct {
	*client
	leader, other atomic.Int64 // reads that asked for the leader, and the others
	old           atomic.Int64 // so many answers to the next reads are old, whoever is asked
	hidden        int          // events at the end that ReadAll does not know
}

func (b *behind) ReadStream(ctx context.Context, n string, f driver.StreamFrom, back bool, c uint64) (driver.Reader, error) {
	if b.old.Add(-1) >= 0 {
		return nil, kind(driver.NotFound, "an old answer")
	}
	if !f.Leader {
		b.other.Add(1)
		return nil, kind(driver.NotFound, "not here yet")
	}
	b.leader.Add(1)
	return b.client.ReadStream(ctx, n, f, back, c)
}

func (b *behind) ReadAll(ctx context.Context, f driver.AllFrom, back bool, c uint64) (driver.Reader, error) {
	if f.End && back && !f.Leader && b.hidden > 0 {
		b.db.mu.Lock()
		f = driver.AllFrom{Position: b.db.all[len(b.db.all)-b.hidden].Position}
		b.db.mu.Unlock()
	}
	return b.client.ReadAll(ctx, f, back, c)
}

// Conditions and keys are judged by what the leader has: a node that lags would
// make conflicts of what is none, and find no key.
func TestLeader_JudgesConditionsAndKeys(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	first := over(t, db)
	c := happened(2)
	c.Key = "k"
	r, err := first.Append(t.Context(), c)
	require.NoError(t, err)
	end := all(t, first, eventstore.OneStream(ann))[1]
	for name, call := range map[string]func(*Store) error{
		"exists": func(s *Store) error {
			_, err := s.Append(t.Context(), eventstore.Commit{Events: happened(1).Events, Conditions: []eventstore.Condition{eventstore.StreamExists(ann)}})
			return err
		},
		"last event": func(s *Store) error {
			_, err := s.Append(t.Context(), eventstore.Commit{Events: happened(1).Events, Conditions: []eventstore.Condition{eventstore.StreamAtEvent(ann, 2, end.ID)}})
			return err
		},
		"key": func(s *Store) error {
			again, err := s.Append(t.Context(), c)
			require.True(t, again.Duplicate)
			require.Equal(t, r.Last, again.Last)
			return err
		},
		"lookup": func(s *Store) error {
			found, used, err := s.Lookup(t.Context(), ann, "k")
			require.True(t, used)
			require.Equal(t, r.Last, found.Last)
			return err
		},
	} {
		copied := newDatabase()
		db.mu.Lock()
		copied.all = append(copied.all[:0], db.all...)
		for name, s := range db.streams {
			own := *s
			copied.streams[name] = &own
		}
		db.mu.Unlock()
		node := &behind{client: copied.client()}
		s, err := Open(t.Context(), "", withDriver(node))
		require.NoError(t, err, "the id of the log is looked for at the leader before one is written")
		require.Equal(t, first.logID, s.logID)
		require.NoError(t, call(s), name)
		require.Positive(t, node.leader.Load())
		require.NoError(t, s.Close())
	}
}

// A cut off write that the server does not recognise, and answers of old: it is
// looked for until it is found, and is no conflict with itself.
func TestPoint22_OldAnswersDecideNothing(t *testing.T) {
	t.Parallel()
	for _, old := range []int64{0, 1, 5} {
		db := newDatabase()
		node := &behind{client: db.client()}
		s, err := Open(t.Context(), "", withDriver(node))
		require.NoError(t, err)
		_, err = s.Append(t.Context(), happened(3))
		require.NoError(t, err)
		_, err = db.client().Delete(t.Context(), "account-ann", driver.Any)
		require.NoError(t, err)
		db.cut(0, 1, func() { node.old.Store(old) })
		c := happened(2)
		c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{})}
		r, err := s.Append(t.Context(), c)
		require.NoError(t, err, "%d old answers", old)
		require.Equal(t, uint64(5), r.Revision(ann).Version)
		require.Len(t, db.streams["account-ann"].events, 5, "written once")
		require.NoError(t, s.Close())
	}
}

// Where the stream ends before the place, nothing was written there: a conflict,
// at once.
func TestPoint22_ExpectationBeyondTheEnd(t *testing.T) {
	t.Parallel()
	for name, there := range map[string]int{"missing": 0, "short": 2} {
		db := newDatabase()
		s := over(t, db)
		if there > 0 {
			_, err := s.Append(t.Context(), happened(there))
			require.NoError(t, err)
		}
		db.cut(1, 0, nil)
		c := happened(1)
		c.Conditions = []eventstore.Condition{eventstore.StreamAt(ann, eventstore.Revision{Version: 9})}
		_, err := s.Append(t.Context(), c)
		conflict, ok := errors.AsType[*eventstore.ConflictError](err)
		require.True(t, ok, "%s: %v", name, err)
		require.Equal(t, uint64(there), conflict.Actual.Version)
	}
}

// The id of a log that is there is found, however long a node lags, and never
// replaced.
func TestLogID_OldAnswers(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	first := over(t, db)
	node := &behind{client: db.client()}
	node.old.Store(6)
	s, err := Open(t.Context(), "", withDriver(node))
	require.NoError(t, err)
	require.Equal(t, first.logID, s.logID)
	require.Len(t, db.streams["deed:log"].events, 1)
	require.NoError(t, s.Close())
	node.old.Store(1 << 40)
	_, err = Open(t.Context(), "", withDriver(&behind{client: db.client()}), Patience(time.Millisecond))
	if err != nil {
		require.ErrorIs(t, err, eventstore.ErrUnavailable)
	}
	endless := &behind{client: db.client()}
	endless.old.Store(1 << 40)
	_, err = Open(t.Context(), "", withDriver(endless), Patience(30*time.Millisecond))
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
}

// The head is never before what this process has written itself.
func TestHead_OfANodeThatLags(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	node := &behind{client: db.client()}
	s, err := Open(t.Context(), "", withDriver(node))
	require.NoError(t, err)
	defer s.Close()
	for range 3 {
		r, err := s.Append(t.Context(), happened(2))
		require.NoError(t, err)
		node.hidden = 2
		head, err := s.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, r.Last, head)
		require.Len(t, all(t, s, eventstore.All()), int(r.Revision(ann).Version), "a read ends at that head")
	}
}

// What the server finds too large is sent once, and said to be so.
func TestTooLarge_IsNotTriedAgain(t *testing.T) {
	t.Parallel()
	db := newDatabase()
	s := over(t, db)
	sent := 0
	db.mu.Lock()
	db.before = func(string, driver.Expected, []driver.Event) error {
		sent++
		return kind(driver.TooLarge, "received message larger than max")
	}
	db.mu.Unlock()
	_, err := s.Append(t.Context(), happened(1))
	require.ErrorIs(t, err, eventstore.ErrTooLarge)
	require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
	require.False(t, eventstore.CanRetry(err))
	require.Equal(t, 1, sent)
}

// newer writes an event of deed's of a format that this program does not know.
func (db *database) newer(stream string) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.write(stream, "happened", &driver.Event{ID: uuid.New(), Data: []byte("{}"), Metadata: fmt.Appendf(nil, `{"deed":%d,"time":[]}`, format+1)})
	db.wake()
}

// An event of a newer format stops those whom it may concern, behind what lies
// before it, and nobody else.
func TestNewerFormat_ConcernsItsReadersAlone(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} { // when the subscriptions have begun
		for name, options := range map[string][]Option{"tail": nil, "no tail": {Tail(1, 1)}} {
			t.Run(fmt.Sprint(name, "/late=", late), func(t *testing.T) {
				t.Parallel()
				db := newDatabase()
				s := over(t, db, options...)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				write := func() {
					for range 2 {
						_, err := s.Append(ctx, happened(2))
						require.NoError(t, err)
					}
					db.newer("order-1")
					_, err := s.Append(ctx, happened(2))
					require.NoError(t, err)
				}
				bell := eventstore.Stream{Category: "bell", ID: "b"}
				ring := func() {
					_, err := s.Append(ctx, eventstore.Commit{Events: []eventstore.Event{{Stream: bell, Type: "rang"}}})
					require.NoError(t, err)
				}
				ring()
				if !late {
					write()
				}
				spared := map[string]eventstore.Query{
					"category": eventstore.OneCategory("account"), "stream": eventstore.OneStream(ann), "type": eventstore.OfTypes("other"),
				}
				hit := map[string]eventstore.Query{
					"all": eventstore.All(), "category": eventstore.OneCategory("order"), "type": eventstore.OfTypes("happened"), "tag": eventstore.Tagged("x"),
				}
				type outcome struct {
					n   int
					err error
				}
				follow := func(q eventstore.Query, began func()) outcome {
					var o outcome
					for batch, err := range s.Subscribe(ctx, q, 0) {
						began()
						if err != nil {
							return outcome{o.n, err}
						}
						for i := range batch.Events {
							if batch.Events[i].Stream == ann {
								o.n++
							}
						}
						if o.n == 6 || batch.Through >= eventstore.Position(db.end()) && !late {
							return o
						}
					}
					return o
				}
				results := map[string]chan outcome{}
				for group, queries := range map[string]map[string]eventstore.Query{"spared ": spared, "hit ": hit} {
					for name, q := range queries {
						if late && group == "spared " && name == "type" {
							continue // it has no events that would end it
						}
						c, began := make(chan outcome, 1), make(chan struct{}, 1)
						results[group+name] = c
						go func() {
							c <- follow(q, func() {
								select {
								case began <- struct{}{}:
								default:
								}
							})
						}()
						<-began
					}
				}
				if late {
					write()
				}
				for name := range spared {
					if c := results["spared "+name]; c != nil {
						o := <-c
						require.NoError(t, o.err, name)
						if name != "type" {
							require.Equal(t, 6, o.n, name)
						}
					}
				}
				for name, q := range hit {
					o := <-results["hit "+name]
					require.ErrorIs(t, o.err, eventstore.ErrNewerVersion, name)
					want := 0
					if q.Everything || name == "type" {
						want = 4
					}
					require.Equal(t, want, o.n, "%s: what lies before it is handed on", name)
				}
				for _, backward := range []bool{false, true} {
					o := eventstore.ReadOptions{Backward: backward}
					for name, q := range spared {
						n, err := rvRead(ctx, s, q, o)
						require.NoError(t, err, name)
						if name != "type" {
							require.Equal(t, 6, n)
						}
					}
					for name, q := range hit {
						_, err := rvRead(ctx, s, q, o)
						require.ErrorIs(t, err, eventstore.ErrNewerVersion, name)
					}
				}
				_, err := rvRead(ctx, s, eventstore.OneStream(eventstore.Stream{Category: "order", ID: "1"}), eventstore.ReadOptions{})
				require.ErrorIs(t, err, eventstore.ErrNewerVersion)
				_, err = s.Append(ctx, happened(1))
				require.NoError(t, err, "its own stream alone is refused")
				head, err := s.Head(ctx)
				require.NoError(t, err)
				require.Equal(t, eventstore.Position(db.end()), head)
			})
		}
	}
}

// end is the position of the last event.
func (db *database) end() uint64 {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.all[len(db.all)-1].Position.Commit
}
