package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/internal/pgtest"
	"github.com/deed-go/deed/projection"
)

// long says that tests may take their time.
func long() bool { return os.Getenv("DEED_TEST_LONG") != "" }

var forms = []form{formCopy, formFunction, formTwoTrips}

// gate holds the committer back, so that several commits become one batch.
type gate struct {
	mu      sync.Mutex
	waiting chan struct{} // nil: open
}

func (g *gate) hold() {
	g.mu.Lock()
	waiting := g.waiting
	g.mu.Unlock()
	if waiting != nil {
		<-waiting
	}
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.waiting)
	g.waiting = nil
}

// bed is a store behind a cable, with what tests of broken connections need.
type bed struct {
	t     testing.TB
	url   string
	cable *cable
	store *Store
	gate  gate
	audit audit

	mu       sync.Mutex
	form     form
	writing  func(*batch) // called before a batch is sent
	rounds   int
	versions map[eventstore.Stream]uint64
}

func newBed(t testing.TB, url string, f form, options ...Option) *bed {
	t.Helper()
	b := &bed{t: t, url: url, form: f, versions: map[eventstore.Stream]uint64{}}
	c, p := newCable(t, b.url)
	b.cable = c
	options = append(options, with(func(s *settings) {
		s.hold = b.gate.hold
		s.forms = func(of *batch) form {
			b.mu.Lock()
			f, writing := b.form, b.writing
			b.mu.Unlock()
			if writing != nil {
				writing(of)
			}
			return f
		}
	}))
	b.store = openPool(t, p, options...)
	return b
}

// onWrite sets what is called, by the committer, before a batch is sent.
func (b *bed) onWrite(fn func(*batch)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writing = fn
}

// round hands in one batch, of every sort of commit, and checks the answers.
func (b *bed) round() {
	b.t.Helper()
	b.rounds++
	name := fmt.Sprintf("%05d", b.rounds) // every batch has the same size
	hot := account("hot")
	version := b.versions[hot]
	keyed := commit(event(account("keyed"), "noted", "round:"+name))
	keyed.Key = "key " + name
	again := commit(event(account("again"), "noted"))
	again.Key, again.Fingerprint = keyed.Key, "the same"
	keyed.Fingerprint = again.Fingerprint
	commits := []eventstore.Commit{
		under(commit(event(hot, "noted", "hot", "round:"+name), event(account("new "+name), "opened"), event(hot, "noted")), at(hot, version), at(account("new "+name), 0)),
		keyed,
		under(commit(event(hot, "refused")), at(hot, version)), // the first has moved it
		again, // a duplicate
		under(commit(event(hot, "noted")), at(hot, version+2), eventstore.NoneMatch(eventstore.Tagged("nobody"), 0)),
	}
	receipts, failures := b.batch(commits...)
	for i, failure := range failures {
		if i == 2 {
			require.ErrorIs(b.t, failure, eventstore.ErrConflict, "round %s", name)
		} else {
			require.NoError(b.t, failure, "round %s, commit %d", name, i)
		}
	}
	require.True(b.t, receipts[3].Duplicate, "round %s", name)
	require.Equal(b.t, receipts[1].First, receipts[3].First, "round %s", name)
	b.versions[hot] += 3
}

// batch appends the commits as one batch.
func (b *bed) batch(commits ...eventstore.Commit) ([]eventstore.Receipt, []error) {
	b.gate.shut()
	pending := make([]*eventstore.Pending, len(commits))
	for i, c := range commits {
		pending[i] = b.store.Enqueue(b.t.Context(), c)
	}
	b.gate.open()
	receipts, failures := make([]eventstore.Receipt, len(commits)), make([]error, len(commits))
	for i, p := range pending {
		receipts[i], failures[i] = p.Result()
		b.audit.note(commits[i], receipts[i], failures[i])
	}
	return receipts, failures
}

func (b *bed) check() {
	b.t.Helper()
	b.cable.onSend(nil)
	b.cable.settle()
	b.round() // what was broken works again, and what comes late has come before this
	b.audit.check(b.t, direct(b.t, b.url), "deed")
}

// cutPoints are the bytes of a message of the size at which it is cut: every other
// one, the even or the odd ones, when there is time.
func cutPoints(size int) []int {
	var some []int
	first, step := 0, max(1, size/32)
	if long() {
		first, step = rand.IntN(2), 2
	}
	for k := first; k < size; k += step {
		some = append(some, k)
	}
	for k := max(0, size-4); k <= size; k++ {
		some = append(some, k)
	}
	slices.Sort(some)
	return slices.Compact(some)
}

// armed cuts the committer's connection once, after so many bytes from the
// moment when a batch is about to be sent.
func (b *bed) arm(k int, how fate) (cut <-chan *line) {
	done := make(chan *line, 1)
	passed := -1 // not armed yet
	var once bool
	b.onWrite(func(*batch) {
		if passed < 0 {
			passed = 0
		}
	})
	b.cable.onSend(func(l *line, message []byte) fate {
		if passed < 0 || once {
			return fate{}
		}
		if passed+len(message) < k {
			passed += len(message)
			return fate{}
		}
		f := how
		f.cut, f.arrives, once = true, k-passed, true
		done <- l
		return f
	})
	return done
}

// size returns how many bytes a batch takes, and leaves the store with a
// connection that has written before.
func (b *bed) size() int {
	b.t.Helper()
	b.round()
	b.round()
	b.onWrite(func(*batch) { b.cable.measure() })
	b.round()
	b.onWrite(nil)
	return b.cable.measure()
}

// The connection breaks after bytes of a batch in turn (cutPoints), the last one
// too, so that the batch is written and nobody is told. Whoever appended gets the
// outcome all the same.
func TestStore_Append_Cut(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			size := b.size()
			require.Greater(t, size, 500)
			for _, k := range cutPoints(size) {
				cut := b.arm(k, fate{})
				b.round()
				require.Len(t, cut, 1, "nothing was cut at byte %d of %d", k, size)
				b.round() // prepares what the new connection has to know: the sizes are the same again
			}
			b.check()
		})
	}
}

// The answer is cut after its bytes in turn, all of them in the long run: the
// server has said what became of the batch, or a part of it, and the client has
// heard as much.
func TestStore_Append_AnswerCut(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			b.round()
			for n := 1; n < 150; n += stride(1, 7) {
				armed, cut := false, false
				b.onWrite(func(*batch) { armed = true })
				b.cable.onSend(func(_ *line, message []byte) fate {
					if !armed || cut || f != formFunction && !bytes.Contains(message, []byte("COPY")) {
						return fate{}
					}
					cut = true
					return fate{cut: true, arrives: len(message), answers: n}
				})
				b.round()
				require.True(t, cut)
				b.round()
			}
			b.check()
		})
	}
}

// atLength skips a test whose way another one takes as well, in part.
func atLength(t *testing.T) {
	t.Helper()
	if !long() {
		t.Skip("TestStore and its like ask for the same in other ways; set DEED_TEST_LONG=1 for this one")
	}
}

// pick returns the first when there is time.
func pick(long_, short int) int {
	if long() {
		return long_
	}
	return short
}

// stride is pick for how many are left out, which are more under the race detector.
func stride(long_, short int) int {
	if metatest.Raced() {
		return 3 * short
	}
	return pick(long_, short)
}

// A batch that is refused, because a stream that was taken for new is not, is
// cut after bytes (every other one of cutPoints in the long run) of all that is said
// until it has its answers, and so is the refusal.
func TestStore_Append_CutInACollision(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			const streams = 5000
			url := pgtest.Database(t)
			var before audit
			other := openURL(t, url)
			for i := 0; i < streams; i += 1000 {
				var c eventstore.Commit
				for n := range 1000 {
					c.Events = append(c.Events, event(account(fmt.Sprintf("old %05d", i+n)), "opened"))
				}
				_, err := before.append(t.Context(), other, c)
				require.NoError(t, err)
			}
			b := newBed(t, url, f) // there is too much to know of
			b.audit.told = before.told
			used := 0
			collide := func() {
				t.Helper()
				used++
				require.LessOrEqual(t, used, streams, "there are no streams left to collide on")
				old, fresh := account(fmt.Sprintf("old %05d", used)), account(fmt.Sprintf("fresh %05d", used))
				_, failed := b.batch(under(commit(event(old, "opened again")), at(old, 0)), under(commit(event(fresh, "opened")), at(fresh, 0)))
				require.ErrorIs(t, failed[0], eventstore.ErrConflict)
				require.NoError(t, failed[1])
			}
			b.round()
			collide()
			b.onWrite(func(*batch) { b.cable.measure(); b.onWrite(nil) })
			collisions := b.store.Stats().Collisions
			collide()
			size := b.cable.measure()
			require.Greater(t, b.store.Stats().Collisions, collisions, "nothing collides: the test tests nothing")
			for n, k := range cutPoints(size) {
				if n%stride(2, 3) != 0 {
					continue
				}
				cut := b.arm(k, fate{})
				collide()
				require.Len(t, cut, 1, "nothing was cut at byte %d of %d", k, size)
			}
			// The first writes of a batch end at the query of form copy and function, and
			// at the second trip: wherever that is, its answer is cut.
			for n := 1; n < 500; n += stride(14, 28) { // as long as a refusal is
				for message := range 3 {
					armed, seen := false, 0
					b.onWrite(func(*batch) { armed = true })
					b.cable.onSend(func(_ *line, m []byte) fate {
						if !armed {
							return fate{}
						}
						if seen++; seen == message+1 {
							return fate{cut: true, arrives: len(m), answers: n}
						}
						return fate{}
					})
					collide()
				}
			}
			b.cable.onSend(nil)
			b.check()
		})
	}
}

// A message that was given up arrives all the same, before or after the batch
// was sent once more by another way: it is not written twice.
func TestStore_Append_LateMessage(t *testing.T) {
	t.Parallel()
	for _, first := range forms {
		for _, second := range forms {
			for _, before := range []bool{true, false} {
				if first == formTwoTrips && !before {
					continue // it has the lock: the second cannot come before it
				}
				when := "AfterTheSecond"
				if before {
					when = "BeforeTheSecond"
				}
				t.Run(fmt.Sprintf("%s_%s_%s", first, second, when), func(t *testing.T) {
					t.Parallel()
					b := newBed(t, pgtest.Database(t), first)
					size := b.size()
					// What arrives in time is nothing, all but a byte, or too little for the server
					// to begin with: a part of it could keep the lock.
					for _, arrives := range []int{0, 3} {
						if first == formTwoTrips {
							// The lock was taken, and the second trip is late.
							arrives += size * 6 / 10
						}
						b.mu.Lock()
						b.form = first
						b.mu.Unlock()
						cut := b.arm(arrives, fate{late: true})
						armed := b.writing
						tries := 0
						var late *line
						b.onWrite(func(of *batch) {
							armed(of)
							if tries++; tries == 1 {
								b.mu.Lock()
								b.form = second
								b.mu.Unlock()
							}
							if tries == 2 {
								late = <-cut
								if before {
									late.deliver()
								}
							}
						})
						b.round()
						require.NotNil(t, late, "it was not sent again")
						if !before {
							late.deliver()
						}
					}
					b.onWrite(nil)
					b.check()
				})
			}
		}
	}
}

// The connection breaks again at any of the messages that follow the first
// break: while the batch is looked for, judged again, sent again.
func TestStore_Append_CutTwice(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			size := b.size()
			for _, first := range []int{0, size} {
				for _, answered := range []bool{false, true} {
					for n := 1; ; n++ {
						armed, passed, count := false, 0, 0
						var broken *line
						var second bool
						b.onWrite(func(*batch) { armed = true })
						b.cable.onSend(func(l *line, m []byte) fate {
							switch {
							case !armed:
							case broken == nil && passed+len(m) >= first:
								broken = l
								return fate{cut: true, arrives: first - passed}
							case broken == nil:
								passed += len(m)
							case l != broken && !second:
								if count++; count == n {
									second = true
									if answered {
										return fate{cut: true, arrives: len(m)}
									}
									return fate{cut: true}
								}
							}
							return fate{}
						})
						b.round()
						require.NotNil(t, broken)
						if !second {
							require.Greater(t, n, 3, "the second break is never reached")
							break
						}
						b.round()
					}
				}
			}
			b.check()
		})
	}
}

// Two tries of one batch do not hold the same commits, since somebody else has
// written between them. Neither is taken for the other.
func TestStore_Append_TriesDiffer(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s_late=%t", f, late), func(t *testing.T) {
				t.Parallel()
				b := newBed(t, pgtest.Database(t), f)
				b.round()
				b.round()
				other := openURL(t, b.url)
				shared, taken, made := account("shared"), account("taken"), account("made")

				// The first try: neither the one that will lose is missing, nor the one that
				// will win is in it.
				tries, armed := 0, false
				var first *line
				b.onWrite(func(*batch) {
					tries++
					armed = true
				})
				written := make(chan struct{})
				b.cable.onSend(func(l *line, m []byte) fate {
					last := f == formFunction && m[0] == 'B' || bytes.Contains(m, []byte("COPY"))
					switch {
					case !armed || !last:
						return fate{}
					case tries == 1:
						armed, first = false, l
						b.cable.setRefuse(true)
						close(written)
						return fate{cut: true, late: late}
					case tries == 2:
						armed = false
						return fate{cut: true, arrives: len(m), done: true} // it is written, and nobody is told
					}
					return fate{}
				})
				go func() {
					<-written
					if late && f == formTwoTrips {
						first.deliver() // it has the lock
					}
					_, err := b.audit.append(t.Context(), other, commit(event(shared, "between"), event(taken, "between"), event(made, "between")))
					if err != nil {
						t.Error(err)
					}
					if late && f != formTwoTrips {
						first.deliver() // now it must not be written any more
					}
					b.cable.setRefuse(false)
				}()
				receipts, failed := b.batch(
					commit(event(shared, "one"), event(shared, "two")),
					under(commit(event(taken, "loses")), at(taken, 0)),
					under(commit(event(account("own"), "wins")), eventstore.StreamExists(made)),
					commit(event(shared, "three")),
				)
				require.NoError(t, failed[0])
				require.NoError(t, failed[3])
				require.NoError(t, failed[2])
				if late && f == formTwoTrips {
					require.NoError(t, failed[1], "the first try came before the others, and was written")
				} else {
					require.Equal(t, 2, tries)
					require.ErrorIs(t, failed[1], eventstore.ErrConflict)
					require.EqualValues(t, 3, receipts[0].Revision(shared).Version)
				}
				b.check()
			})
		}
	}
}

// Connections break at random, in every way, while several processes write.
func TestStore_Append_BrokenAtRandom(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]Option{"default": nil, "copy": {always(formCopy)}, "function": {always(formFunction)}, "two_trips": {always(formTwoTrips)}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			w := &workload{writers: 4, commits: pick(60, 25), seed: rand.Uint64()}
			var spies []*spy
			var cables []*cable
			var broken atomic.Int64
			for i := range 2 {
				c, p := newCable(t, url)
				r := rand.New(rand.NewPCG(w.seed, uint64(1000+i)))
				s := openPool(t, p, options...)
				w.stores = append(w.stores, s)
				cables = append(cables, c)
				c.onSend(func(_ *line, m []byte) fate {
					if r.IntN(12) != 0 {
						return fate{}
					}
					broken.Add(1)
					f := fate{cut: true, arrives: len(m), done: r.IntN(2) == 0}
					if r.IntN(2) == 0 {
						f.arrives, f.done = r.IntN(len(m)), false
					} else if r.IntN(3) == 0 {
						f.answers, f.done = 1+r.IntN(200), false
					}
					return f
				})
				// Readers have a network of their own, which lasts.
				spies = append(spies, watch(t, openURL(t, url)), watch(t, s))
			}
			w.run(t)
			for _, c := range cables {
				c.onSend(nil)
				c.settle()
			}
			require.Greater(t, broken.Load(), int64(5))
			t.Logf("%d connections were broken", broken.Load())
			w.check(t, url, spies...)
		})
	}
}

// A server that takes connections and says nothing is one that cannot be
// reached: calls fail when patience is at an end, in a way that callers know.
func TestStore_SilentServer(t *testing.T) {
	t.Parallel()
	network := pgtest.Proxy(t, pgtest.Database(t))
	s := openURL(t, network.URL(), Patience(time.Millisecond))
	mustAppend(t, s, commit(event(account("a"), "noted")))
	network.Pause()
	network.Cut()
	// What was sent on the broken connection may have arrived.
	_, err := s.Append(t.Context(), commit(event(account("lost"), "noted")))
	require.True(t, errors.Is(err, eventstore.ErrUnavailable) != errors.Is(err, eventstore.ErrOutcomeUnknown), err)
	together(2, func(i int) {
		var err error
		if i == 0 {
			_, err = s.Append(t.Context(), commit(event(account("a"), "noted")))
		} else {
			_, err = s.Head(t.Context())
		}
		if !errors.Is(err, eventstore.ErrUnavailable) || !eventstore.CanRetry(err) || errors.Is(err, eventstore.ErrOutcomeUnknown) {
			t.Errorf("the answer was: %v", err)
		}
	})
	network.Resume()
	require.EqualValues(t, 2, mustAppend(t, s, commit(event(account("a"), "noted"))).Last)

	if !long() {
		return
	}
	// A connection that was made before and has gone silent takes longer.
	network.Pause()
	together(3, func(i int) {
		var err error
		switch i {
		case 0:
			if _, err = s.Append(t.Context(), commit(event(account("a"), "noted"))); !errors.Is(err, eventstore.ErrOutcomeUnknown) {
				t.Errorf("the answer was: %v", err)
			}
			return
		case 1:
			_, err = s.Head(t.Context())
		case 2:
			_, _, err = s.Lookup(t.Context(), account("a"), "key")
		}
		if !errors.Is(err, eventstore.ErrUnavailable) {
			t.Errorf("the answer was: %v", err)
		}
	})
	network.Resume()
	mustAppend(t, s, commit(event(account("a"), "noted")))
}

// The server is restarted, and sessions are ended, while two processes write
// and follow. Nobody notices, but for the time it takes.
func TestStore_ServerRestarts(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"fast", "immediate", "kill", "sessions ended"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			server := pgtest.Start(t, pgtest.Settings{"fsync": "off"})
			url := server.Database(t)
			w := &workload{writers: 4, commits: pick(150, 60)}
			var spies []*spy
			for range 2 {
				s := openURL(t, url)
				w.stores = append(w.stores, s)
				spies = append(spies, watch(t, s))
			}
			readers := w.stores[0]
			total := int64(len(w.stores) * w.writers * w.commits)
			due := make(chan struct{}) // whoever is due waits: the work does not end before
			w.step = func(done int64) {
				if done%(total/4) == 0 && done < total {
					due <- struct{}{}
				}
			}
			finished := make(chan struct{})
			go func() {
				defer close(finished)
				w.run(t)
			}()
			outages := 0
			for busy := true; busy; {
				select {
				case <-due:
					outages++
					if mode != "sessions ended" {
						server.Restart(mode)
						break
					}
					conn := direct(t, server.URL())
					for range 5 {
						do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'deed %'")
						_, err := readers.Head(t.Context())
						require.NoError(t, err)
					}
				case <-finished:
					busy = false
				}
			}
			require.Equal(t, 3, outages)
			w.check(t, url, spies...)
		})
	}
}

// Calls wait for a database as long as they were told to. Nothing is written of
// what was refused, neither then nor later.
func TestStore_Patience(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	c, p := newCable(t, url)
	impatient := openPool(t, p, Patience(100*time.Millisecond))
	var a audit
	_, err := a.append(t.Context(), impatient, commit(event(account("a"), "noted")))
	require.NoError(t, err)
	seen := watch(t, impatient)
	seen.at(1)

	network := pgtest.Proxy(t, url)
	patient := openURL(t, network.URL(), Patience(time.Hour))
	waits := make(chan error, 3)

	c.setRefuse(true)
	network.Refuse(true)
	conn := direct(t, url)
	eventually(t, func() bool {
		// Again and again: one may have been on its way here.
		do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
		return scalar[int](t, conn, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'") == 1
	}, "sessions remain")
	go func() {
		_, err := a.append(t.Context(), patient, commit(event(account("b"), "noted")))
		waits <- err
	}()
	go func() {
		_, err := patient.Head(t.Context())
		waits <- err
	}()
	go func() {
		waits <- patient.Update(t.Context(), func(projection.StateTx) error { return nil })
	}()

	// The first answer can be that it was sent and nobody knows; from then on there
	// is no connection to send on.
	_, err = a.append(t.Context(), impatient, commit(event(account("a"), "noted")))
	require.Error(t, err)
	for name, call := range map[string]func() error{
		"append": func() error {
			_, err := a.append(t.Context(), impatient, commit(event(account("a"), "noted")))
			return err
		},
		"read": func() error {
			for _, err := range impatient.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
				return err
			}
			return nil
		},
		"head":   func() error { _, err := impatient.Head(t.Context()); return err },
		"lookup": func() error { _, _, err := impatient.Lookup(t.Context(), account("a"), "key"); return err },
		"update": func() error { return impatient.Update(t.Context(), func(projection.StateTx) error { return nil }) },
		"lease":  func() error { _, err := impatient.Acquire(t.Context(), "view", "me", 0); return err },
	} {
		err := call()
		require.ErrorIs(t, err, eventstore.ErrUnavailable, name)
		require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown, name)
		require.True(t, eventstore.CanRetry(err), name)
	}
	select {
	case err := <-waits:
		require.Fail(t, "it had time, and did not wait", "%v", err)
	default:
	}

	c.setRefuse(false)
	network.Refuse(false)
	for range 3 {
		require.NoError(t, <-waits)
	}
	_, err = a.append(t.Context(), impatient, commit(event(account("a"), "noted")))
	require.NoError(t, err)
	a.check(t, conn, "deed")
	seen.at(3)
}

// A read that is going on when its connection is ended goes on where it was.
func TestStore_Read_SessionsEnded(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	fill(t, s, 3*pageSize)
	conn := direct(t, url)
	for _, o := range []eventstore.ReadOptions{{}, {Backward: true}} {
		for _, q := range []eventstore.Query{eventstore.All(), eventstore.OneCategory("filler"), eventstore.OneStream(eventstore.Stream{Category: "filler", ID: "1"})} {
			var got []eventstore.Position
			for e, err := range s.Read(t.Context(), q, o) {
				require.NoError(t, err)
				if got = append(got, e.Position); len(got)%200 == 0 {
					do(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
				}
			}
			if o.Backward {
				slices.Reverse(got)
			}
			require.Len(t, got, 3*pageSize)
			for i, p := range got {
				require.EqualValues(t, i+1, p)
			}
		}
	}
}

// stopWithTheLock makes the bed's store send a batch but for its end, and waits until
// it has the log's lock. Waits is closed when the store has its answer.
func stopWithTheLock(b *bed, size int, conn *pgx.Conn) (stopped *line, waits chan struct{}) {
	b.t.Helper()
	stopping := b.arm(size-20, fate{late: true})
	waits = make(chan struct{})
	go func() {
		defer close(waits)
		b.round()
	}()
	stopped = <-stopping
	eventually(b.t, func() bool { return locks(b.t, conn) == 1 }, "the stopped process does not have the lock")
	return stopped, waits
}

// locks counts those who have a lock of a log, or wait for one.
func locks(t testing.TB, conn *pgx.Conn) int {
	t.Helper()
	return scalar[int](t, conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
}

// A process is stopped in the middle of the message that has taken the lock:
// its connection lives, and nothing comes. The others end its session after
// three seconds of waiting, and what it had sent is not written.
func TestStore_StoppedWithTheLock(t *testing.T) {
	t.Parallel()
	for _, f := range []form{formCopy, formTwoTrips} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			size := b.size()
			other := openURL(t, b.url)
			conn := direct(t, b.url)
			b.cable.setRefuse(true) // it does not come back meanwhile
			stopped, waits := stopWithTheLock(b, size, conn)
			began := time.Now()
			_, err := b.audit.append(t.Context(), other, commit(event(account("free"), "noted")))
			require.NoError(t, err)
			require.Less(t, time.Since(began), 8*time.Second, "the lock was kept for too long")
			require.EqualValues(t, 1, other.Stats().Unblocked)
			<-stopped.gone
			b.cable.setRefuse(false)
			<-waits
			b.check()
		})
	}
}

// The same where nobody is left who appends but in transactions of the program's own.
func TestStore_AppendTx_StoppedWithTheLock(t *testing.T) {
	t.Parallel()
	b := newBed(t, pgtest.Database(t), formCopy)
	size := b.size()
	other := openURL(t, b.url)
	conn, watcher := direct(t, b.url), direct(t, b.url)
	b.cable.setRefuse(true)
	stopped, waits := stopWithTheLock(b, size, watcher)
	tx := begin(t, conn)
	c := commit(event(account("free"), "noted"))
	r, err := other.AppendTx(t.Context(), tx, c)
	require.NoError(t, err)
	require.NoError(t, tx.Commit(t.Context()))
	b.audit.note(c, r, nil)
	require.EqualValues(t, 1, other.Stats().Unblocked)
	<-stopped.gone
	b.cable.setRefuse(false)
	<-waits
	b.check()
}

// A transaction that has appended and is then left idle does not keep the lock.
func TestStore_AppendTx_LeftIdle(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	s := openURL(t, url)
	conn := direct(t, url)
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = s.AppendTx(t.Context(), tx, commit(event(account("idle"), "noted")))
	require.NoError(t, err)
	// By the server: nobody waits for the lock who would end it.
	watcher := direct(t, url)
	eventually(t, func() bool {
		return locks(t, watcher) == 0
	}, "it keeps the lock")
	require.EqualValues(t, 1, mustAppend(t, s, commit(event(account("free"), "noted"))).First)
	require.Zero(t, s.Stats().Unblocked)
	require.Error(t, tx.Commit(t.Context()), "the session was ended, and nothing of it is stored")
	require.Len(t, readAll(t, s, eventstore.All()), 1)
}

// Close and the end of a context answer what is on its way: nobody knows what
// becomes of what was sent, and what was not sent is not written.
func TestStore_Append_GivenUp(t *testing.T) {
	t.Parallel()
	for _, f := range forms {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			b := newBed(t, pgtest.Database(t), f)
			size := b.size()

			// The context ends while the batch is on its way.
			ctx, cancel := context.WithCancel(t.Context())
			sending, resume := make(chan struct{}), make(chan struct{})
			b.onWrite(func(*batch) { b.onWrite(nil); close(sending); <-resume })
			answer := make(chan error, 2)
			go func() {
				_, err := b.audit.append(ctx, b.store, commit(event(account("given up"), "noted")))
				answer <- err
			}()
			<-sending
			// This one has not been taken by a batch.
			waiting, cancelWaiting := context.WithCancel(t.Context())
			go func() {
				_, err := b.audit.append(waiting, b.store, commit(event(account("not taken"), "noted")))
				answer <- err
			}()
			eventually(t, func() bool { return b.store.appends.Len() == 1 }, "it does not wait")
			cancelWaiting()
			err := <-answer
			require.ErrorIs(t, err, context.Canceled)
			require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
			cancel()
			err = <-answer
			require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
			require.ErrorIs(t, err, context.Canceled)
			close(resume)
			b.round()
			require.Len(t, readAll(t, b.store, eventstore.OneStream(account("given up"))), 1, "it was on its way and nothing was in it")

			// The store is closed while the database is away.
			cut := b.arm(size, fate{})
			b.cable.setRefuse(true)
			pending := []*eventstore.Pending{}
			var commits []eventstore.Commit
			enqueue := func(c eventstore.Commit) {
				commits, pending = append(commits, c), append(pending, b.store.Enqueue(t.Context(), c))
			}
			enqueue(commit(event(account("sent"), "noted"), event(account("sent, too"), "a long type, so that it is the last byte of this one where it is cut, or one in the middle", strings.Repeat("x", 200), strings.Repeat("y", 200))))
			<-cut
			eventually(t, func() bool { return b.store.appends.Len() == 0 }, "it was not taken")
			enqueue(commit(event(account("not sent"), "noted")))
			require.NoError(t, b.store.Close())
			for i, p := range pending {
				r, err := p.Result()
				b.audit.note(commits[i], r, err)
				if i == 0 {
					require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
				} else {
					require.ErrorIs(t, err, eventstore.ErrUnavailable)
					require.NotErrorIs(t, err, eventstore.ErrOutcomeUnknown)
				}
			}
			_, err = b.store.Append(t.Context(), commit(event(account("late"), "noted")))
			require.ErrorIs(t, err, eventstore.ErrClosed)
			b.cable.settle()
			b.audit.check(t, direct(t, b.url), "deed")
		})
	}
}
