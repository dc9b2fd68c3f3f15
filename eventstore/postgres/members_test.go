package postgres

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	groups "github.com/deed-go/deed/internal/ownership"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// mortal is a node's way to the others, which ends without a word.
type mortal struct {
	groups.Directory
	dead atomic.Bool
}

func (m *mortal) pass(ctx context.Context) error {
	if m.dead.Load() {
		<-ctx.Done()
	}
	return ctx.Err()
}

func (m *mortal) Join(ctx context.Context, self groups.Member, ttl time.Duration) error {
	if err := m.pass(ctx); err != nil {
		return err
	}
	return m.Directory.Join(ctx, self, ttl)
}

func (m *mortal) Leave(ctx context.Context, name string) error {
	if err := m.pass(ctx); err != nil {
		return err
	}
	return m.Directory.Leave(ctx, name)
}

func (m *mortal) Members(ctx context.Context) ([]groups.Member, error) {
	if err := m.pass(ctx); err != nil {
		return nil, err
	}
	return m.Directory.Members(ctx)
}

func (m *mortal) Watch(ctx context.Context) (<-chan struct{}, error) {
	return m.Directory.(interface {
		Watch(ctx context.Context) (<-chan struct{}, error)
	}).Watch(ctx)
}

type groupNode struct {
	link  *mortal
	units []*groups.Unit
	stop  func() error
}

func (n *groupNode) owns() (count int) {
	for _, u := range n.units {
		if u.Valid() {
			count++
		}
	}
	return count
}

const dividedUnits = 9

func startGroup(t *testing.T, s *Store, name string, ttl time.Duration) *groupNode {
	t.Helper()
	d, err := projection.Members(s)
	require.NoError(t, err)
	link := &mortal{Directory: d}
	return startNode(link, groups.Options{Name: name, TTL: ttl, Look: groups.LookOften, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))}, link)
}

func startNode(d groups.Directory, o groups.Options, link *mortal) *groupNode {
	n := &groupNode{link: link}
	g := groups.New(d, o)
	for i := range dividedUnits {
		n.units = append(n.units, g.Offer(fmt.Sprint("projection-", i)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	n.stop = func() error { cancel(); return <-ended }
	return n
}

func divided(nodes ...*groupNode) func() bool {
	return func() bool {
		sum := 0
		for _, n := range nodes {
			owns := n.owns()
			if owns != dividedUnits/len(nodes) && owns != (dividedUnits+len(nodes)-1)/len(nodes) {
				return false
			}
			sum += owns
		}
		return sum == dividedUnits
	}
}

// Three processes on one database divide the work. One that stops is followed
// at once, one that dies when the database's clock says that its time is
// up.
func TestMembers_Takeover(t *testing.T) {
	t.Parallel()
	for _, kind := range []struct {
		name   string
		kill   bool
		ttl    time.Duration
		rounds int
	}{{"graceful", false, 10 * time.Second, 10}, {"killed with a short time", true, 2 * time.Second, pick(3, 1)}, {"killed", true, 10 * time.Second, 1}} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			if kind.kill && kind.ttl > 2*time.Second {
				atLength(t)
			}
			url := pgtest.Database(t)
			stores := []*Store{openURL(t, url), openURL(t, url), openURL(t, url)}
			named := 0
			start := func(s *Store) *groupNode {
				named++
				return startGroup(t, s, fmt.Sprint("node-", named), kind.ttl)
			}
			nodes := []*groupNode{start(stores[0]), start(stores[1]), start(stores[2])}
			var took []time.Duration
			for round := range kind.rounds {
				i := round % 3
				eventually(t, divided(nodes...), "the work is not divided among three")
				leaving, others := nodes[i], slices.Delete(slices.Clone(nodes), i, i+1)
				began := time.Now()
				if kind.kill {
					leaving.link.dead.Store(true)
				} else {
					require.NoError(t, leaving.stop())
					require.Zero(t, leaving.owns(), "it has given up everything when it has left")
				}
				eventually(t, divided(others...), "the work of a node that has ended is not taken over")
				took = append(took, time.Since(began))
				if kind.kill {
					require.Zero(t, leaving.owns(), "it gave up everything before the others could have it")
					_ = leaving.stop()
				}
				nodes[i] = start(stores[i])
			}
			eventually(t, divided(nodes...), "the work is not divided among three at last")
			for _, n := range nodes {
				require.NoError(t, n.stop())
			}
			slices.Sort(took)
			t.Logf("%d handovers with a TTL of %s: min %s, median %s, max %s", len(took), kind.ttl, took[0], took[len(took)/2], took[len(took)-1])
			if kind.kill {
				require.Less(t, took[len(took)-1], kind.ttl+2*time.Second)
			} else {
				// Far less than what waiting for its time to be up would take; how fast it
				// is TestNodes shows, with nothing else at work.
				require.Less(t, took[len(took)/2], kind.ttl/5)
			}
		})
	}
}

// Who looks once and then hardly ever hears of those who leave.
func TestMembers_Told(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	stores := []*Store{openURL(t, url), openURL(t, url)}
	eventually(t, stores[1].follower.listening.Load, "it does not listen")
	start := func(s *Store, name string) *groupNode {
		d, err := projection.Members(s)
		require.NoError(t, err)
		return startNode(d, groups.Options{Name: name, TTL: time.Hour, Look: time.Hour, Logger: slog.New(slog.DiscardHandler)}, &mortal{Directory: d})
	}
	first := start(stores[0], "first")
	eventually(t, divided(first), "the only node does not do all")
	heir := start(stores[1], "heir")
	eventually(t, func() bool { return heir.owns() > 0 }, "it does not take its part")
	require.Less(t, heir.owns(), dividedUnits)
	// A notifier that has a connection already: one that takes long to have one tries again later.
	listener := direct(t, url)
	do(t, listener, "LISTEN "+pgx.Identifier{stores[0].channel()}.Sanitize())
	for told := false; !told; {
		mustAppend(t, stores[0], commit(event(account("ann"), "noted")))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		_, err := listener.WaitForNotification(ctx)
		cancel()
		if told = err == nil; !told {
			listener = direct(t, url)
			do(t, listener, "LISTEN "+pgx.Identifier{stores[0].channel()}.Sanitize())
		}
	}
	names := stores[1].Released(t.Context())
	require.NoError(t, first.stop())
	eventually(t, divided(heir), "nobody has told it that the other one has left")
	require.Equal(t, "member.0", <-names)
	require.NoError(t, heir.stop())
}
