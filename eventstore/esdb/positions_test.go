package esdb

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
)

// laggard reads old views of streams.
type laggard struct {
	*client
	mu  sync.Mutex
	rnd *rand.Rand
	p   float64
	lag int // exact number of reads that see nothing new; -1: random
	cut int // events of the stream that are not there yet
}

type cutReader struct {
	driver.Reader
	below uint64
}

func (r *cutReader) Next(ctx context.Context) (*driver.Recorded, error) {
	for {
		e, err := r.Reader.Next(ctx)
		if err != nil || e.Revision < r.below {
			return e, err
		}
	}
}

func (l *laggard) ReadStream(ctx context.Context, n string, f driver.StreamFrom, back bool, c uint64) (driver.Reader, error) {
	l.mu.Lock()
	miss := 0
	if l.lag > 0 {
		l.lag--
		miss = l.cut
	} else if l.lag < 0 && l.rnd.Float64() < l.p {
		miss = 1 + l.rnd.IntN(4)
	}
	l.mu.Unlock()
	if miss == 0 {
		return l.client.ReadStream(ctx, n, f, back, c)
	}
	l.db.mu.Lock()
	size := 0
	if s := l.db.streams[n]; s != nil {
		size = len(s.events)
	}
	l.db.mu.Unlock()
	if size <= miss {
		if size == 0 {
			return l.client.ReadStream(ctx, n, f, back, c)
		}
		return &fakeReader{err: kind(driver.NotFound, "not there yet")}, nil
	}
	if f.End {
		f = driver.StreamFrom{Revision: uint64(size - miss - 1)}
	}
	r, err := l.client.ReadStream(ctx, n, f, back, c)
	if err != nil {
		return nil, err
	}
	return &cutReader{r, uint64(size - miss)}, nil
}

// A multi-event commit read back from a node that lags.
func TestStore_PositionsFromLaggingNode(t *testing.T) {
	db := newDatabase()
	d := &laggard{client: db.client()}
	s, err := Open(t.Context(), "", withDriver(d), Patience(5*time.Second))
	require.NoError(t, err)
	defer s.Close()
	d.lag, d.cut = 2, 2
	_, err = s.Append(t.Context(), rvCommit(2, eventstore.StreamAt(rv, eventstore.Revision{})))
	require.NoError(t, err)
}

// Writers of two processes, keys that they share, answers that are lost, and nodes
// that lag: what is acknowledged is written once, in its place; what is refused is
// not written; a key is written once. ROUNDS=n tries n seeds.
func TestStore_Fuzz(t *testing.T) {
	t.Parallel()
	rounds := 25
	if text := os.Getenv("ROUNDS"); text != "" {
		var err error
		rounds, err = strconv.Atoi(text)
		require.NoError(t, err, "ROUNDS=%q", text)
	}
	for seed := range rounds {
		fuzz(t, uint64(seed), 0)
		fuzz(t, uint64(seed), 0.2)
	}
}

func fuzz(t *testing.T, seed uint64, lag float64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex
	roll := func(n int) int { mu.Lock(); defer mu.Unlock(); return rnd.IntN(n) }
	db := newDatabase()
	trouble := func(after bool) func(string, driver.Expected, []driver.Event) error {
		return func(string, driver.Expected, []driver.Event) error {
			switch r := roll(24); {
			case r < 2:
				return kind(driver.Unavailable, "cut")
			case r < 4:
				return kind(driver.Timeout, "late")
			case r == 4 && !after:
				return &driver.Error{Kind: driver.Unavailable, Unsent: true, Err: errors.New("unsent")}
			case r == 5 && !after:
				return kind(driver.Rejected, "eof")
			case r == 6:
				return kind(driver.Unknown, "unknown")
			}
			return nil
		}
	}
	var stores []*Store
	for range 2 {
		s, err := Open(t.Context(), "", withDriver(&laggard{client: db.client(), rnd: rand.New(rand.NewPCG(seed, 2)), p: lag, lag: -1}), Patience(20*time.Second))
		require.NoError(t, err)
		defer s.Close()
		stores = append(stores, s)
	}
	db.mu.Lock()
	db.before, db.after = trouble(false), trouble(true)
	db.mu.Unlock()
	type result struct {
		mark, key string
		n         int
		r         eventstore.Receipt
		err       error
		cond      bool
		want      uint64
	}
	var results []result
	var w sync.WaitGroup
	for worker := range 4 {
		w.Go(func() {
			s := stores[worker%2]
			version := uint64(0)
			for i := range 6 {
				n := 1 + roll(3)
				mark := fmt.Sprintf("w%d.%d", worker, i)
				c := rvCommit(n)
				for j := range c.Events {
					c.Events[j].Type = mark
					if n == 3 {
						c.Events[j].ID = uuid.Must(uuid.NewV7())
					}
				}
				res := result{mark: mark, n: n}
				switch roll(4) {
				case 0:
					c.Conditions = []eventstore.Condition{eventstore.StreamAt(rv, eventstore.Revision{Version: version})}
					res.cond, res.want = true, version
				case 1:
					c.Conditions = []eventstore.Condition{eventstore.StreamExists(rv)}
				case 2:
					c.Key = "k" + strconv.Itoa(i) // shared by the workers; the same fingerprint
					c.Fingerprint = "f"
					res.key = c.Key
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				if roll(8) == 0 {
					cancel()
					ctx, cancel = context.WithTimeout(t.Context(), time.Duration(roll(3000))*time.Microsecond)
				}
				res.r, res.err = s.Append(ctx, c)
				cancel()
				if res.err == nil {
					version = res.r.Revision(rv).Version
				}
				if ce, ok := errors.AsType[*eventstore.ConflictError](res.err); ok {
					version = ce.Actual.Version
				}
				mu.Lock()
				results = append(results, res)
				mu.Unlock()
			}
		})
	}
	w.Wait()
	count := map[string]int{}
	db.mu.Lock()
	var types []string
	if st := db.streams["account-ann"]; st != nil {
		for _, i := range st.events {
			types = append(types, db.all[i].Type)
			count[db.all[i].Type]++
		}
	}
	db.mu.Unlock()
	firsts := map[string]string{}
	for _, r := range results {
		bad := ""
		if r.key != "" && r.err == nil && !r.r.Duplicate {
			if firsts[r.key] != "" {
				bad = "key twice"
			}
			firsts[r.key] = r.mark
		}
		switch {
		case r.err == nil && !r.r.Duplicate:
			at := r.r.Revision(rv).Version
			if count[r.mark] != r.n || types[at-1] != r.mark || types[at-uint64(r.n)] != r.mark {
				bad = "acknowledged"
			}
			if r.cond && at-uint64(r.n) != r.want {
				bad = "condition"
			}
		case r.err == nil:
			if count[r.mark] != 0 {
				bad = "duplicate"
			}
		case errors.Is(r.err, eventstore.ErrOutcomeUnknown):
			if count[r.mark] != 0 && count[r.mark] != r.n {
				bad = "unknown"
			}
		default:
			if count[r.mark] != 0 {
				bad = "refused"
			}
			if !errors.Is(r.err, eventstore.ErrConflict) && !errors.Is(r.err, context.DeadlineExceeded) {
				t.Logf("seed %d lag %v: %s: %v", seed, lag, r.mark, r.err)
			}
		}
		if bad != "" {
			t.Fatalf("seed %d lag %v: %s: %s n=%d count=%d %+v %v\n%v", seed, lag, bad, r.mark, r.n, count[r.mark], r.r, r.err, types)
		}
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	keys := map[string]bool{}
	for i := range db.all {
		var m envelope
		if db.all[i].Stream != "account-ann" || json.Unmarshal(db.all[i].Metadata, &m) != nil || m.Key == "" {
			continue
		}
		require.False(t, keys[m.Key], "seed %d lag %v: key %q is written twice", seed, lag, m.Key)
		keys[m.Key] = true
	}
}
