package postgres

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/pgtest"
)

// lag measures how late the machine wakes a goroutine, until it is stopped: 99
// of 100 times. Where that is much, the machine is busy with something else.
func lag() (stop func() time.Duration) {
	var late []time.Duration
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			began := time.Now()
			select {
			case <-end:
				return
			case <-time.After(2 * time.Millisecond):
				late = append(late, time.Since(began)-2*time.Millisecond)
			}
		}
	}()
	return func() time.Duration {
		close(end)
		<-ended
		slices.Sort(late)
		return late[len(late)*99/100]
	}
}

// A subscriber of another process sees a commit soon, when nothing else is
// going on: with notifications, and without them by looking more often.
func TestStore_Subscribe_Latency(t *testing.T) {
	if testing.Short() {
		t.Skip("it measures time")
	}
	for _, test := range []struct {
		name    string
		options []Option
		pace    time.Duration
		within  time.Duration // 99 of 100
	}{
		{"Told", nil, 5 * time.Millisecond, 25 * time.Millisecond},
		{"Untold", []Option{with(func(s *settings) { s.deaf = true })}, 20 * time.Millisecond, 150 * time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			url := pgtest.Database(t)
			writer, other := openURL(t, url), openURL(t, url, test.options...)
			type arrival struct {
				position eventstore.Position
				at       time.Time
			}
			arrivals := make(chan arrival, 10_000)
			ready := make(chan struct{})
			go func() {
				for b, err := range other.Subscribe(t.Context(), eventstore.All(), 0) {
					if err != nil {
						return
					}
					now := time.Now()
					select {
					case <-ready:
					default:
						close(ready)
					}
					for _, e := range b.Events {
						arrivals <- arrival{e.Position, now}
					}
				}
			}()
			mustAppend(t, writer, commit(event(account("ann"), "noted")))
			<-ready
			report, quiet, soon := "", 0, false
			for round := range 12 {
				commits := 200
				if test.pace > 10*time.Millisecond {
					commits = 60
				}
				committed := map[eventstore.Position]time.Time{}
				ticker, busy := time.NewTicker(test.pace), lag()
				for range commits {
					<-ticker.C
					r := mustAppend(t, writer, commit(event(account("ann"), "noted")))
					committed[r.Last] = time.Now()
				}
				ticker.Stop()
				var took []time.Duration
				for len(took) < commits {
					a := <-arrivals
					if at, ok := committed[a.position]; ok {
						took = append(took, max(0, a.at.Sub(at)))
					}
				}
				slices.Sort(took)
				p50, p99 := took[len(took)/2], took[len(took)*99/100]
				machine := busy()
				report += fmt.Sprintf("round %d: p50 %s, p99 %s, max %s; the machine's own lag: p99 %s\n", round, p50, p99, took[len(took)-1], machine)
				if p99 < test.within {
					t.Log(report)
					return
				}
				soon = soon || p50 < test.within
				if machine < test.within/10 {
					if quiet++; quiet == 3 {
						require.Fail(t, "in three quiet rounds it was never soon enough", "%s expected:\n%s", test.within, report)
					}
				}
			}
			require.True(t, soon, "not even half of them came soon enough, in any round; %s expected:\n%s", test.within, report)
			t.Skipf("the machine is too busy to measure a latency of %s:\n%s", test.within, report)
		})
	}
}

// Notifications come at once when little is written, less often the longer much is,
// and at once again when that is over.
func TestNotifier_PauseAfter(t *testing.T) {
	t.Parallel()
	pause := betweenNotifications
	for range 3 {
		pause = pauseAfter(pause, 9, pause)
		require.Equal(t, betweenNotifications, pause, "a writer that waits for each commit")
	}
	for _, want := range []time.Duration{4, 8, 8} {
		pause = pauseAfter(pause, 5*pause.Milliseconds(), pause)
		require.Equal(t, want*time.Millisecond, pause, "many writers")
	}
	require.Equal(t, betweenNotifications, pauseAfter(pause, 39, pause), "less than that for as long as the pause was")
	require.Equal(t, betweenNotifications, pauseAfter(pause, 40, pause+time.Millisecond), "the notification took a while")
	require.Equal(t, betweenNotifications, pauseAfter(pause, 0, pause))
}

// What could not be told is told later, the names of leases too; and before the end,
// where that is possible.
func TestNotifier_TriesAgain(t *testing.T) {
	t.Parallel()
	db := pgtest.Database(t)
	network := pgtest.Proxy(t, db)
	listener := direct(t, db)
	s := openURL(t, network.URL())
	do(t, listener, "LISTEN "+pgx.Identifier{s.channel()}.Sanitize())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	heard := func(want string) { // it may come twice, when the answer is lost
		t.Helper()
		for {
			n, err := listener.WaitForNotification(ctx)
			require.NoError(t, err, want)
			if n.Payload == want {
				return
			}
		}
	}
	s.notifier.tell(7)
	heard("7")
	for i := range 2 {
		network.Refuse(true)
		network.Cut()
		s.notifier.lease(fmt.Sprint("lease ", i))
		eventually(t, func() bool { return len(s.notifier.wake) == 0 }, "it was not tried")
		eventually(t, func() bool {
			s.notifier.mu.Lock()
			defer s.notifier.mu.Unlock()
			return len(s.notifier.released) > 0
		}, "%d was forgotten", i)
		s.notifier.tell(eventstore.Position(8 + i))
		network.Refuse(false)
		if i == 1 {
			require.NoError(t, s.Close())
		}
		heard(fmt.Sprint(8 + i))
		heard(fmt.Sprint(releasedPrefix, "lease ", i))
	}
}
