package nats

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// A server that leads no more has refused a commit, as the first to answer, and
// the leader has written it.
func refusedByYesterday(answer []byte) []byte {
	return []byte(`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 1"},"stream":"x","seq":0}`)
}

// The writer is told the truth once somebody knows it.
func TestYesterday_RefusedAndWritten(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 3)
	for name, commit := range shapes() {
		for _, what := range []string{"ends", "messages", "both"} {
			refused := once()
			var lies atomic.Int32
			store, _ := openLog(t, c, hooked(func(s *settings) {
				s.reply = func(answer []byte) []byte {
					if !refused() {
						return answer
					}
					lies.Store(5)
					return refusedByYesterday(answer)
				}
				s.stale = func(r *getRequest) bool {
					return (what == "both" || (r.Last != "") == (what == "ends")) && lies.Add(-1) >= 0
				}
			}))
			r, err := store.Append(t.Context(), commit)
			require.NoError(t, err, "%s, %s", name, what)
			require.False(t, r.Duplicate)
			lies.Store(0)
			stored(t, store, commit)
		}
	}
}

// When nobody does, the writer is told that it is unknown; not that the commit
// was not written, nor that events are missing.
func TestYesterday_RefusedAndNobodyKnows(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 3)
	unknown := 0
	for name, commit := range shapes() {
		for _, what := range []string{"ends", "messages", "both"} {
			refused := once()
			var lies atomic.Bool
			store, _ := openLog(t, c, Patience(200*time.Millisecond), hooked(func(s *settings) {
				s.reply = func(answer []byte) []byte {
					if refused() {
						lies.Store(true)
					}
					if lies.Load() {
						return refusedByYesterday(answer)
					}
					return answer
				}
				s.stale = func(r *getRequest) bool {
					return (what == "both" || (r.Last != "") == (what == "ends")) && lies.Load()
				}
			}))
			_, err := store.Append(t.Context(), commit)
			if err != nil { // another request may have brought the truth
				require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown, "%s, %s", name, what)
				unknown++
			}
			lies.Store(false)
			stored(t, store, commit)
			// It goes on, though not always in so short a time on a machine that is busy.
			for began := time.Now(); ; {
				_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
				if err == nil || time.Since(began) > 30*time.Second || !errors.Is(err, eventstore.ErrUnavailable) && !errors.Is(err, eventstore.ErrOutcomeUnknown) {
					break
				}
			}
			require.NoError(t, err, "it goes on")
		}
	}
	require.Greater(t, unknown, 5)
}

// What a leader of yesterday does not know is not missing: messages are asked
// for again, and ends that lie before what was seen are not believed.
func TestYesterday_Reads(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 3)
	var lies atomic.Int32
	store, _ := openLog(t, c, hooked(func(s *settings) {
		s.stale = func(*getRequest) bool { return lies.Add(-1) >= 0 }
	}))
	ann := account("ann")
	r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(ann, 40)})
	require.NoError(t, err)
	for range 3 {
		lies.Store(4)
		head, err := store.Head(t.Context())
		require.NoError(t, err)
		require.Equal(t, r.Last, head)
		lies.Store(4)
		require.Len(t, read(t, store, eventstore.OneStream(ann), eventstore.ReadOptions{}), 40)
		lies.Store(4)
		m, err := store.at(t.Context(), uint64(r.First))
		require.NoError(t, err)
		require.EqualValues(t, 1, m.Version)
	}
}

// A subscriber who reads pages is not told that there is nothing more by a
// server that does not know: not once, and not by half.
func TestYesterday_Scan(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 3)
	var lies atomic.Int32
	store, _ := openLog(t, c, Tail(1, 1), hooked(func(s *settings) {
		s.stale = func(*getRequest) bool { return lies.Add(-1) >= 0 }
	}))
	var last eventstore.Receipt
	for range 10 {
		var err error
		last, err = store.Append(t.Context(), eventstore.Commit{Events: append(happened(account("ann"), 3), happened(eventstore.Stream{Category: "other", ID: "x"}, 3)...)})
		require.NoError(t, err)
	}
	for _, q := range []eventstore.Query{eventstore.OneCategory("account"), eventstore.OneCategory("other"), eventstore.All()} {
		for n := range int32(5) {
			got := 0
			pages := store.scanner(q)
			for after := eventstore.Position(0); after < last.Last; {
				lies.Store(n)
				events, reached, err := pages.next(t.Context(), after, last.Last)
				require.NoError(t, err)
				got += len(events)
				after = reached
			}
			want := 30
			if q.Everything {
				want = 60
			}
			require.Equal(t, want, got, "%d wrong answers", n)
		}
	}
}

// The same with a node that was the leader and has been cut off, with its
// clients: what they know to be stored, it does not have.
func TestYesterday_ScanCutOff(t *testing.T) {
	long(t)
	t.Parallel()
	for _, between := range []int{1, pageEvents + 100} {
		c := servers(t, 3)
		name := newName()
		maker := reopenLog(t, c, name)
		first, err := maker.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
		require.NoError(t, err)
		require.NoError(t, c.Settled(t.Context(), name))
		yesterday := c.Leader(name)
		require.GreaterOrEqual(t, yesterday, 0)
		asked := make(chan struct{}, 1000)
		behind, err := Open(t.Context(), c.NodeURL(yesterday), Stream(name), quiet(), Patience(time.Minute), hooked(func(s *settings) {
			s.attempt = time.Second
			s.stale = func(r *getRequest) bool {
				if r.Sequence > 0 && r.Batch == 0 && r.Next == "" {
					select {
					case asked <- struct{}{}:
					default:
					}
				}
				return false
			}
		}))
		require.NoError(t, err)
		defer behind.Close()
		writer, err := Open(t.Context(), c.NodeURL((yesterday+1)%3), Stream(name), quiet(), Patience(time.Minute), hooked(func(s *settings) { s.attempt = time.Second }))
		require.NoError(t, err)
		defer writer.Close()
		c.CutOff(yesterday)
		_, err = writer.Append(t.Context(), eventstore.Commit{Events: happened(eventstore.Stream{Category: "other", ID: "x"}, between)})
		require.NoError(t, err)
		last, err := writer.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
		require.NoError(t, err)
		wrong, err := behind.leader(t.Context(), &getRequest{Next: behind.subjects.category("account"), Sequence: uint64(first.Last) + 1})
		t.Logf("a leader of yesterday says that there is no more: %v (%v)", wrong == nil && err == nil, err)
		behind.saw(uint64(last.Last))
		type answer struct {
			events []eventstore.Recorded
			err    error
		}
		answers := make(chan answer, 1)
		go func() {
			var a answer
			for after := first.Last; after < last.Last && a.err == nil; {
				var events []eventstore.Recorded
				events, after, a.err = behind.scanner(eventstore.OneCategory("account")).next(t.Context(), after, last.Last)
				a.events = append(a.events, events...)
			}
			answers <- a
		}()
		var a answer
		select {
		case <-asked:
			c.Rejoin(yesterday)
			a = <-answers
		case a = <-answers:
			c.Rejoin(yesterday)
		}
		require.NoError(t, a.err)
		require.Len(t, a.events, 1, "an event was skipped")
		require.Equal(t, last.Last, a.events[0].Position)
	}
}
