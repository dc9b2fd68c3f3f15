package nats

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/internal/natsserver"
)

// scattered appends what events of the category "account" make, of so many
// streams, and of another one between them.
func scattered(tb testing.TB, store *Store, streams, accounts, others int) {
	tb.Helper()
	for done := 0; done < accounts+others; {
		var commit eventstore.Commit
		for range min(500, accounts+others-done) {
			of := eventstore.Stream{Category: "other", ID: fmt.Sprint(done % streams)}
			if done*accounts/(accounts+others) < (done+1)*accounts/(accounts+others) {
				of.Category = "account"
			}
			commit.Events = append(commit.Events, happened(of, 1)...)
			done++
		}
		_, err := store.Append(tb.Context(), commit)
		require.NoError(tb, err)
	}
}

// A category is read whole, and by its pattern where it is rare: what comes is the
// same, wherever the reading begins and ends.
func TestScanner_DenseAndRare(t *testing.T) {
	metatest.NotRaced(t)
	t.Parallel()
	c, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	store, _ := openLog(t, c, Tail(1, 1))
	for _, accounts := range []int{1900, 40, 2000, 0, 700} {
		scattered(t, store, 30, accounts, 2000-accounts)
	}
	head, err := store.Head(t.Context())
	require.NoError(t, err)
	accounts := eventstore.OneCategory("account")
	var want []eventstore.Recorded
	for r, err := range store.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		if accounts.Matches(&r) {
			want = append(want, r)
		}
	}
	require.Len(t, want, 1900+40+2000+700)
	for _, after := range []eventstore.Position{0, 1, 1800, 2001, 3999, 7000} {
		for _, through := range []eventstore.Position{after + 1, after + 600, 7500, head} {
			var got []eventstore.Recorded
			whole, filtered := 0, 0
			pages := store.scanner(accounts)
			for at := after; at < through; {
				if pages.dense {
					whole++
				} else {
					filtered++
				}
				events, reached, err := pages.next(t.Context(), at, through)
				require.NoError(t, err)
				require.Greater(t, reached, at)
				got, at = append(got, events...), reached
			}
			var expected []eventstore.Recorded
			for i := range want {
				if want[i].Position > after && want[i].Position <= through {
					expected = append(expected, want[i])
				}
			}
			require.Equal(t, expected, got, "after %d, through %d", after, through)
			if after == 0 && through == head {
				require.Greater(t, whole, 5, "dense parts are read whole")
				require.Greater(t, filtered, 2, "rare ones are not")
				require.Less(t, whole+filtered, 20)
			}
		}
	}
}

// What lies between may be large: then the pattern is kept, for a while.
func TestScanner_LargeBetween(t *testing.T) {
	t.Parallel()
	c, err := natsserver.Start(natsserver.Options{})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	store, _ := openLog(t, c, Tail(1, 1))
	const n = 4000
	for range n / 100 {
		var commit eventstore.Commit
		for range 100 {
			commit.Events = append(commit.Events, happened(account("ann"), 1)...)
			commit.Events = append(commit.Events, eventstore.Event{Stream: eventstore.Stream{Category: "video", ID: "x"}, Type: "shot", Data: make([]byte, 10_000)})
		}
		_, err := store.Append(t.Context(), commit)
		require.NoError(t, err)
	}
	pages := store.scanner(eventstore.OneCategory("account"))
	got, asked, whole := 0, 0, 0
	for at := eventstore.Position(0); at < 2*n; asked++ {
		if pages.dense {
			whole++
		}
		events, reached, err := pages.next(t.Context(), at, 2*n)
		require.NoError(t, err)
		got, at = got+len(events), reached
	}
	require.Equal(t, n, got)
	require.Equal(t, 1, whole)
	require.Less(t, asked, 15)
}

// BenchmarkRead_Category reads a category that is all of the log but for one event.
func BenchmarkRead_Category(b *testing.B) {
	for _, streams := range []int{10, 3000} {
		c := benchServers(b, 1)
		store, _ := openLog(b, c, Tail(1, 1))
		scattered(b, store, streams, 30_000, 1)
		for _, how := range []string{"as it comes", "by its pattern"} {
			b.Run(fmt.Sprintf("%d streams/%s", streams, how), func(b *testing.B) {
				head, err := store.Head(b.Context())
				require.NoError(b, err)
				read := 0
				for b.Loop() {
					pages := store.scanner(eventstore.OneCategory("account"))
					for at := eventstore.Position(0); at < head; {
						events, reached, err := pages.next(b.Context(), at, head)
						require.NoError(b, err)
						at = reached
						read += len(events)
						pages.dense = pages.dense && how == "as it comes"
					}
				}
				b.ReportMetric(float64(read)/b.Elapsed().Seconds(), "events/s")
			})
		}
	}
}
