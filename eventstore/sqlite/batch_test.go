package sqlite

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/projection"
)

// gate holds the writer before it takes a batch, so that a test decides which
// commits a batch is made of.
type gate struct {
	once    sync.Once
	arrived chan struct{} // the writer waits
	opened  chan struct{}
}

func newGate() *gate { return &gate{arrived: make(chan struct{}), opened: make(chan struct{})} }

// option makes the writer wait, once, as soon as there is a commit.
func (g *gate) option() Option {
	return func(s *settings) error {
		s.hold = func() {
			g.once.Do(func() { close(g.arrived); <-g.opened })
		}
		return nil
	}
}

func one(stream eventstore.Stream, eventType string, tags ...string) []eventstore.Event {
	return []eventstore.Event{{Stream: stream, Type: eventType, Tags: tags, Data: []byte("{}")}}
}

func at(stream eventstore.Stream, version uint64) []eventstore.Condition {
	return []eventstore.Condition{eventstore.StreamAt(stream, eventstore.Revision{Version: version})}
}

// One batch of commits, each judged on what the earlier ones did: winners,
// losers, equal keys, commits that depend on others.
func TestStore_Batch(t *testing.T) {
	t.Parallel()
	d, g := newDisk(t), newGate()
	s := open(t, filepath.Join(t.TempDir(), "log.db"), vfs(d.name), g.option())
	bob := eventstore.Stream{Category: "account", ID: "bob"}
	unique := []eventstore.Condition{eventstore.NoneMatch(eventstore.Tagged("name:ann"), 0)}
	var conflict *eventstore.ConflictError
	steps := []struct {
		name   string
		commit eventstore.Commit
		check  func(eventstore.Receipt, error)
	}{
		{"first", eventstore.Commit{Events: one(ann, "opened", "name:ann"), Conditions: append(at(ann, 0), unique...), Key: "k1"}, func(r eventstore.Receipt, err error) {
			require.NoError(t, err)
			require.EqualValues(t, 1, r.Last)
		}},
		{"same expectation", eventstore.Commit{Events: one(ann, "opened"), Conditions: at(ann, 0)}, func(_ eventstore.Receipt, err error) {
			require.ErrorAs(t, err, &conflict)
			require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, conflict.Actual)
		}},
		{"boundary taken", eventstore.Commit{Events: one(bob, "opened"), Conditions: unique, Key: "k2"}, func(_ eventstore.Receipt, err error) {
			require.ErrorAs(t, err, &conflict)
			require.EqualValues(t, 1, conflict.Found)
		}},
		{"dependent", eventstore.Commit{Events: one(ann, "changed"), Conditions: at(ann, 1)}, func(r eventstore.Receipt, err error) {
			require.NoError(t, err)
			require.Equal(t, eventstore.Revision{Version: 2, Position: 2}, r.Revision(ann))
		}},
		{"same key", eventstore.Commit{Events: one(ann, "opened", "name:ann"), Conditions: append(at(ann, 0), unique...), Key: "k1"}, func(r eventstore.Receipt, err error) {
			require.NoError(t, err)
			require.True(t, r.Duplicate)
			require.EqualValues(t, 1, r.Last)
			require.Equal(t, eventstore.Revision{Version: 1, Position: 1}, r.Revision(ann))
		}},
		{"key reused", eventstore.Commit{Events: one(ann, "other"), Key: "k1"}, func(_ eventstore.Receipt, err error) {
			require.ErrorIs(t, err, eventstore.ErrKeyReused)
		}},
		{"the loser left no key", eventstore.Commit{Events: one(bob, "opened"), Conditions: at(bob, 0), Key: "k2"}, func(r eventstore.Receipt, err error) {
			require.NoError(t, err)
			require.False(t, r.Duplicate)
			require.EqualValues(t, 3, r.Last)
		}},
		{"depends on a loser", eventstore.Commit{Events: one(bob, "changed"), Conditions: at(bob, 2)}, func(_ eventstore.Receipt, err error) {
			require.ErrorAs(t, err, &conflict)
			require.Equal(t, eventstore.Revision{Version: 1, Position: 3}, conflict.Actual)
		}},
		{"last", eventstore.Commit{Events: one(ann, "changed"), Conditions: at(ann, 2)}, func(r eventstore.Receipt, err error) {
			require.NoError(t, err)
			require.EqualValues(t, 4, r.Last)
		}},
	}
	pending := make([]*eventstore.Pending, len(steps))
	for i, step := range steps {
		pending[i] = s.Enqueue(t.Context(), step.commit)
		if i == 0 {
			<-g.arrived
		}
	}
	before := syncs(d)
	close(g.opened)
	for i, step := range steps {
		t.Log(step.name)
		step.check(pending[i].Result())
	}
	require.Equal(t, before+1, syncs(d), "syncs for the whole batch")
	var types []string
	for e, err := range s.Read(t.Context(), eventstore.All(), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		types = append(types, e.Stream.ID+" "+e.Type)
	}
	require.Equal(t, []string{"ann opened", "ann changed", "bob opened", "ann changed"}, types)
}

// A reader that meets a half-changed index of the write-ahead log takes the
// write lock for a moment, as does a tool that looks into the file. The writer
// waits for it.
func TestStore_WriteLockTakenForAMoment(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log.db")
	waits := make(chan struct{}, 1_000_000)
	locked := func(s *settings) error { s.locked = func() { waits <- struct{}{} }; return nil }
	s := open(t, path, locked, func(s *settings) error { s.patience = time.Minute; return nil })
	appendOne(t, s, ann, "opened")
	other, err := dial(path, "")
	require.NoError(t, err)
	defer other.close()
	put := func(tx projection.StateTx) error { return tx.Put("t", "k", []byte("v")) }
	for name, write := range map[string]func() error{
		"append": func() error {
			_, err := s.Append(t.Context(), eventstore.Commit{Events: one(ann, "noted")})
			return err
		},
		"update": func() error { return s.Update(t.Context(), put) },
	} {
		require.NoError(t, other.exec("BEGIN IMMEDIATE"))
		outcome := make(chan error, 1)
		go func() { outcome <- write() }()
		select {
		case err := <-outcome:
			t.Fatalf("%s did not wait: %v", name, err)
		case <-waits:
		}
		require.NoError(t, other.exec("ROLLBACK"))
		require.NoError(t, <-outcome, name)
		for len(waits) > 0 {
			<-waits
		}
	}

	// Who keeps it is named, nothing was written, and trying again helps.
	require.NoError(t, s.Close())
	s = open(t, path, locked)
	require.NoError(t, other.exec("BEGIN IMMEDIATE"))
	_, err = s.Append(t.Context(), eventstore.Commit{Events: one(ann, "late")})
	require.ErrorIs(t, err, eventstore.ErrUnavailable)
	require.ErrorContains(t, err, "another program has had the write lock")
	require.True(t, eventstore.CanRetry(err))
	require.Error(t, s.Update(t.Context(), put))
	require.NoError(t, other.exec("ROLLBACK"))
	appendOne(t, s, ann, "late")
	require.NoError(t, s.Update(t.Context(), put))
	n := 0
	for e, err := range s.Read(t.Context(), eventstore.OneStream(ann), eventstore.ReadOptions{}) {
		require.NoError(t, err)
		n++
		require.EqualValues(t, n, e.Version)
	}
	require.Equal(t, 3, n)
}

func syncs(d *disk) int {
	n := 0
	for _, o := range d.operations() {
		if o.kind == opSync && o.file == "log.db-wal" {
			n++
		}
	}
	return n
}

func TestStore_Cancel(t *testing.T) {
	t.Parallel()
	g := newGate()
	d := newDisk(t)
	s := open(t, filepath.Join(t.TempDir(), "log.db"), vfs(d.name), g.option())
	holder := s.Enqueue(t.Context(), eventstore.Commit{Events: one(ann, "opened")})
	<-g.arrived
	// Nobody has taken these: they are removed, and say so at once.
	ctx, cancel := context.WithCancel(t.Context())
	enqueued := s.Enqueue(ctx, eventstore.Commit{Events: one(ann, "enqueued")})
	appended := make(chan error)
	go func() {
		_, err := s.Append(ctx, eventstore.Commit{Events: one(ann, "appended")})
		appended <- err
	}()
	cancel()
	_, err := enqueued.Result()
	require.Equal(t, context.Canceled, err)
	require.Equal(t, context.Canceled, <-appended)
	// This one is taken and being written when its context ends: its outcome counts.
	writing, written := make(chan struct{}), make(chan struct{})
	var once sync.Once
	d.failWith(func(o operation) int32 {
		if o.kind == opSync {
			once.Do(func() { close(writing); <-written })
		}
		return sqlite3.SQLITE_OK
	})
	ctx, cancel = context.WithCancel(t.Context())
	taken := s.Enqueue(ctx, eventstore.Commit{Events: one(ann, "taken")})
	close(g.opened)
	<-writing
	cancel()
	close(written)
	r, err := taken.Result()
	require.NoError(t, err)
	require.EqualValues(t, 2, r.Last)
	_, err = holder.Result()
	require.NoError(t, err)
	head, err := s.Head(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, head)
}

func TestStore_CloseFinishesWhatItWasGiven(t *testing.T) {
	t.Parallel()
	g := newGate()
	path := filepath.Join(t.TempDir(), "log.db")
	s := open(t, path, g.option())
	var pending []*eventstore.Pending
	for range 10 {
		pending = append(pending, s.Enqueue(t.Context(), eventstore.Commit{Events: one(ann, "changed")}))
	}
	<-g.arrived
	subscribed, ended := make(chan struct{}), make(chan error)
	go func() {
		for _, err := range s.Subscribe(context.Background(), eventstore.All(), 0) {
			if err != nil {
				ended <- err
				return
			}
			close(subscribed)
		}
	}()
	<-subscribed
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	require.ErrorIs(t, <-ended, eventstore.ErrClosed)
	_, err := s.Append(t.Context(), eventstore.Commit{Events: one(ann, "late")})
	require.ErrorIs(t, err, eventstore.ErrClosed)
	close(g.opened)
	require.NoError(t, <-closed)
	for _, p := range pending {
		_, err := p.Result()
		require.NoError(t, err)
	}
	again := open(t, path)
	head, err := again.Head(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 10, head)
}

// The disk fails in the middle of a batch: everybody gets an error, nothing is
// there, and the store works again when the disk does.
func TestStore_DiskFails(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fails   func(operation) bool
		unknown bool // the disk goes on failing, so that nobody can know
	}{
		"Write":       {fails: func(o operation) bool { return o.kind == opWrite && o.file == "log.db-wal" }, unknown: true},
		"Sync":        {fails: func(o operation) bool { return o.kind == opSync && o.file == "log.db-wal" }, unknown: true},
		"SyncOnce":    {fails: once(func(o operation) bool { return o.kind == opSync && o.file == "log.db-wal" })},
		"WriteOnce":   {fails: once(func(o operation) bool { return o.kind == opWrite && o.file == "log.db-wal" })},
		"ThirdWrites": {fails: third(func(o operation) bool { return o.kind == opWrite && o.file == "log.db-wal" })},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDisk(t)
			path := filepath.Join(t.TempDir(), "log.db")
			s := open(t, path, vfs(d.name), checkpointAt(50))
			appendOne(t, s, ann, "opened")
			require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("rows", "a", []byte("1")) }))
			d.failWith(func(o operation) int32 {
				if test.fails(o) {
					return sqlite3.SQLITE_IOERR_WRITE
				}
				return sqlite3.SQLITE_OK
			})
			var pending []*eventstore.Pending
			for range 5 {
				pending = append(pending, s.Enqueue(t.Context(), eventstore.Commit{Events: one(ann, "lost"), Conditions: nil}))
			}
			for i, p := range pending {
				_, err := p.Result()
				if test.unknown {
					require.Error(t, err, i)
				}
				if err != nil && !test.unknown {
					require.False(t, errors.Is(err, eventstore.ErrOutcomeUnknown), err)
					require.ErrorContains(t, err, "nothing was written")
				}
			}
			d.failWith(nil)
			before, err := s.Head(t.Context())
			require.NoError(t, err)
			r := appendOne(t, s, ann, "changed")
			require.Equal(t, before+1, r.Last)
			require.Equal(t, uint64(r.Last), r.Revision(ann).Version)
			trace := d.operations()
			require.NoError(t, s.Close())
			// And then the power fails, too.
			platter := newPlatter()
			for _, o := range trace {
				platter.play(o)
			}
			left := t.TempDir()
			require.NoError(t, write(left, platter.after(losesAll, nil)))
			for _, path := range []string{path, filepath.Join(left, "log.db")} {
				again := open(t, path)
				head, err := again.Head(t.Context())
				require.NoError(t, err)
				require.Equal(t, r.Last, head)
				require.NoError(t, again.View(t.Context(), func(tx projection.StateTx) error {
					_, found, err := tx.Get("rows", "a")
					require.True(t, found, "state written before an acknowledged append")
					return err
				}))
			}
		})
	}
}

// After a failed sync the old write-ahead log may have holes on the disk that
// nobody can see. As long as a reader keeps it in use, appends are refused.
func TestStore_DiskFailsUnderReader(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	path := filepath.Join(t.TempDir(), "log.db")
	s := open(t, path, vfs(d.name))
	appendOne(t, s, ann, "opened")
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("rows", "a", []byte("1")) }))
	require.NoError(t, s.View(t.Context(), func(tx projection.StateTx) error {
		_, found, err := tx.Get("rows", "a")
		require.NoError(t, err)
		require.True(t, found)
		fails := once(func(o operation) bool { return o.kind == opSync && o.file == "log.db-wal" })
		d.failWith(func(o operation) int32 {
			if fails(o) {
				return sqlite3.SQLITE_IOERR_FSYNC
			}
			return sqlite3.SQLITE_OK
		})
		_, err = s.Append(t.Context(), eventstore.Commit{Events: one(ann, "lost")})
		require.ErrorIs(t, err, eventstore.ErrOutcomeUnknown)
		_, err = s.Append(t.Context(), eventstore.Commit{Events: one(ann, "refused")})
		require.ErrorContains(t, err, "nothing was written")
		return nil
	}))
	r := appendOne(t, s, ann, "changed")
	require.EqualValues(t, 2, r.Last)
	platter := newPlatter()
	for _, o := range d.operations() {
		platter.play(o)
	}
	left := t.TempDir()
	require.NoError(t, write(left, platter.after(losesAll, nil)))
	again := open(t, filepath.Join(left, "log.db"))
	head, err := again.Head(t.Context())
	require.NoError(t, err)
	require.Equal(t, r.Last, head)
}

// A sync that fails in a checkpoint is not forgotten: SQLite would go on
// behind pages of the write-ahead log that the system may have lost.
func TestStore_CheckpointFails(t *testing.T) {
	t.Parallel()
	d := newDisk(t)
	path := filepath.Join(t.TempDir(), "log.db")
	s := open(t, path, vfs(d.name), checkpointAt(25))
	appendOne(t, s, ann, "opened")
	failed := make(chan struct{})
	fails := once(func(o operation) bool {
		// Not the sync of a new log's header, which the update brings about.
		return o.kind == opSync && o.file == "log.db-wal" && d.trace[len(d.trace)-1].at != 0
	})
	d.failWith(func(o operation) int32 {
		if fails(o) {
			close(failed)
			return sqlite3.SQLITE_IOERR_FSYNC
		}
		return sqlite3.SQLITE_OK
	})
	// Large enough for a checkpoint, which syncs it; the append alone is not.
	require.NoError(t, s.Update(t.Context(), func(tx projection.StateTx) error { return tx.Put("rows", "a", make([]byte, 200_000)) }))
	<-failed
	appendOne(t, s, ann, "changed")
	platter := newPlatter()
	for _, o := range d.operations() {
		platter.play(o)
	}
	left := t.TempDir()
	require.NoError(t, write(left, platter.after(losesAll, nil)))
	again := open(t, filepath.Join(left, "log.db"))
	head, err := again.Head(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, head)
}

func once(fails func(operation) bool) func(operation) bool {
	done := false
	return func(o operation) bool {
		if done || !fails(o) {
			return false
		}
		done = true
		return true
	}
}

func third(fails func(operation) bool) func(operation) bool {
	n := 0
	return func(o operation) bool {
		if !fails(o) {
			return false
		}
		n++
		return n%3 == 0
	}
}
