package nats

import (
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
			_, err = store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
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
