//go:build unix

package postgres

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// chaosVariable, when set, makes TestChaosProcess one of the processes of a
// chaos, with the plan in it.
const chaosVariable = "DEED_TEST_CHAOS_PROCESS"

// chaosPlan is what a process is told when it starts.
type chaosPlan struct {
	URL, Dir, Name string
	Seed           uint64
	Writers        int
	Patience       time.Duration
	Mixed          bool // batches are written in all forms, by chance, and not in the best one
	Cuts           int  // after one of so many messages the connection is lost; 0 for none
	Unlocked       bool // nobody takes the log's lock
	Keyless        bool // no idempotency keys
	Careless       bool // a store that has found a hole is opened anew
	Projections    bool // see TestChaos_Projections
	Nodes          bool // see TestNodes
	Sagas          bool // see TestSagas
	Gateway        string
	Lease          time.Duration
	NATS           string // where the log is, and the nodes find each other; empty for the same database
}

// What a process says on its standard output, and is told on its input.
const (
	chaosSays     = "chaos: "
	chaosReady    = "ready"
	chaosFreezing = "freezing" // it is about to stop itself
	chaosDrained  = "drained"  // nothing more is appended
	chaosDone     = "done"     // with what it has counted, as JSON
	chaosFreeze   = "freeze"   // stop at the worst moment: see the freezers
	chaosThaw     = "thaw"     // do not, after all
	chaosFinish   = "finish"   // with the head of the log: read up to it, and end
)

// The files of a process in the plan's folder.
const (
	claimsFile = ".claims"
	portsFile  = ".ports" // of its connections, one a line
	seenFile   = ".seen"  // preceded by the name of the reader
)

// TestChaosProcess is not a test of its own: it is a process of a chaos.
func TestChaosProcess(t *testing.T) {
	text := os.Getenv(chaosVariable)
	if text == "" {
		t.Skip("it is run by TestChaos")
	}
	var plan chaosPlan
	require.NoError(t, json.Unmarshal([]byte(text), &plan))
	switch {
	case plan.Projections:
		projectingProcess(t, plan)
		return
	case plan.Sagas:
		sagaProcess(t, plan)
		return
	case plan.Nodes:
		nodeProcess(t, plan)
		return
	}
	p := newChaosProcess(t, plan)
	p.run()
}

// control is how a process hears from whoever started it.
type control struct {
	term     chan os.Signal
	freezers map[string]*freezer
	finish   chan string // the rest of the line
}

func newControl(freezers map[string]*freezer) *control {
	c := &control{term: make(chan os.Signal, 1), freezers: freezers, finish: make(chan string, 1)}
	signal.Notify(c.term, syscall.SIGTERM)
	return c
}

// listen returns at the last command. When whoever started the process is gone
// there is nothing left to do.
func (c *control) listen() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case chaosFreeze:
			c.freezers[rest].armed.Store(true)
		case chaosThaw:
			c.freezers[rest].armed.Store(false)
		case chaosFinish:
			c.finish <- rest
			return
		}
	}
	os.Exit(1)
}

func say(words ...any) { fmt.Print(chaosSays + fmt.Sprintln(words...)) }

// freezer stops the process at the worst moment.
type freezer struct {
	armed         atomic.Bool
	before, after func() // it is stopped; may be nil
}

// now stops the process if it was told to, and returns when it goes on. Other
// threads may run for a moment before the signal reaches them; the caller
// waits.
func (f *freezer) now() {
	if !f.armed.CompareAndSwap(true, false) {
		return
	}
	continued := make(chan os.Signal, 1)
	signal.Notify(continued, syscall.SIGCONT)
	defer signal.Stop(continued)
	if f.before != nil {
		f.before()
	}
	say(chaosFreezing)
	_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	<-continued
	if f.after != nil {
		f.after()
	}
}

// chaosConn is a connection that fails its user.
type chaosConn struct {
	net.Conn
	freezer *freezer
	cut     func() bool // decides whether the answer to what was just written is lost
	lost    atomic.Bool
}

// Write stops the process, when it is told to, after what begins to write a batch
// and before the first of the events: the server has the lock of the log then, and
// waits.
func (c *chaosConn) Write(b []byte) (int, error) {
	sent := 0
	if c.freezer.armed.Load() && bytes.Contains(b, copyHeader) {
		data := 0
		for b[data] != 'd' {
			data += 1 + int(binary.BigEndian.Uint32(b[data+1:]))
		}
		n, err := c.Conn.Write(b[:data])
		if err != nil {
			return n, err
		}
		c.freezer.now()
		sent = n
	}
	n, err := c.Conn.Write(b[sent:])
	if err == nil && c.cut() {
		// The server has it all, and will do it.
		c.lost.Store(true)
		_ = c.Conn.Close()
	}
	return sent + n, err
}

func (c *chaosConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.lost.Load() {
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	}
	return n, err
}

// chaosProcess appends and reads for as long as it is let.
type chaosProcess struct {
	t       testing.TB
	plan    chaosPlan
	control *control
	freezer *freezer
	claims  *os.File
	ports   *os.File
	pool    *pgxpool.Pool
	dice    *rand.Rand // of the committer
	stop    atomic.Bool
	head    atomic.Uint64 // the last position that an append of this process was told
	far     chan struct{} // closed when the log has some events

	mu    sync.Mutex
	store *Store
	past  Stats // of the stores before
}

func newChaosProcess(t testing.TB, plan chaosPlan) *chaosProcess {
	p := &chaosProcess{t: t, plan: plan, freezer: &freezer{}, far: make(chan struct{}), dice: rand.New(rand.NewPCG(plan.Seed, 1<<32))}
	p.control = newControl(map[string]*freezer{"log": p.freezer})
	p.claims = appendTo(t, plan, claimsFile)
	p.ports = appendTo(t, plan, portsFile)
	p.pool = chaosPool(t, plan, p.freezer, p.ports)
	return p
}

func appendTo(t testing.TB, plan chaosPlan, suffix string) *os.File {
	file, err := os.OpenFile(filepath.Join(plan.Dir, plan.Name+suffix), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	t.Cleanup(func() { _ = file.Close() })
	return file
}

// chaosPool makes connections that fail as they are told, and writes down their
// ports.
func chaosPool(t testing.TB, plan chaosPlan, f *freezer, ports *os.File) *pgxpool.Pool {
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(plan.Seed, 1<<33))
	cut := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return plan.Cuts > 0 && random.IntN(plan.Cuts) == 0
	}
	return pool(t, plan.URL, func(c *pgxpool.Config) {
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			_, port, _ := net.SplitHostPort(conn.LocalAddr().String())
			_, _ = fmt.Fprintln(ports, port)
			return &chaosConn{Conn: conn, freezer: f, cut: cut}, nil
		}
	})
}

func (p *chaosProcess) open() (*Store, error) {
	return OpenPool(context.Background(), p.pool, Patience(p.plan.Patience), with(func(s *settings) {
		s.unlocked = p.plan.Unlocked
		if p.plan.Mixed {
			s.forms = p.form
		}
	}))
}

// form picks how a batch is written, by chance where the batch leaves it open.
func (p *chaosProcess) form(b *batch) form {
	switch {
	case b.anchored, b.restless >= fewTries:
		return formTwoTrips
	case p.freezer.armed.Load():
		return []form{formCopy, formTwoTrips}[p.dice.IntN(2)]
	}
	return []form{formCopy, formFunction, formTwoTrips}[p.dice.IntN(3)]
}

func (p *chaosProcess) current() *Store {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.store
}

// reopen replaces a store that will not go on; there is none at first.
func (p *chaosProcess) reopen(broken *Store) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.store != broken {
		return
	}
	if broken != nil {
		p.past = addStats(p.past, broken.Stats())
		_ = broken.Close()
	}
	for {
		s, err := p.open()
		if err == nil {
			p.store = s
			return
		}
		if !eventstore.CanRetry(err) {
			p.t.Errorf("open: %v", err)
			p.stop.Store(true)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func addStats(a, b Stats) Stats {
	return Stats{
		Batches: a.Batches + b.Batches, Commits: a.Commits + b.Commits, Events: a.Events + b.Events,
		Copies: a.Copies + b.Copies, Calls: a.Calls + b.Calls, DoubleTrips: a.DoubleTrips + b.DoubleTrips,
		LockWait: a.LockWait + b.LockWait, LockHold: a.LockHold + b.LockHold,
		Collisions: a.Collisions + b.Collisions, Unblocked: a.Unblocked + b.Unblocked, Polls: a.Polls + b.Polls,
	}
}

func (p *chaosProcess) run() {
	if p.reopen(nil); p.store == nil {
		p.t.FailNow()
	}
	ctx, cancel := context.WithCancel(p.t.Context())
	defer cancel()
	var listening, writing, reading sync.WaitGroup
	listening.Go(p.control.listen)
	first := p.store
	readers := []*chaosReader{
		p.reader("all", eventstore.All()),
		p.reader("some", chaosSome),
		p.reader("middle", eventstore.All()),
	}
	for _, r := range readers[:2] {
		reading.Go(func() { r.follow(ctx, first, 0) })
	}
	reading.Go(func() {
		select {
		case <-p.far:
			readers[2].follow(ctx, first, eventstore.Position(p.head.Load()/2))
		case <-ctx.Done():
		}
	})
	for i := range p.plan.Writers {
		writing.Go(newChaosWriter(p, i).run)
	}
	say(chaosReady)

	<-p.control.term
	p.stop.Store(true)
	writing.Wait()
	select { // the middle of a log that is too short
	case <-p.far:
	default:
		close(p.far)
	}
	say(chaosDrained)
	var head uint64
	_, err := fmt.Sscan(<-p.control.finish, &head)
	require.NoError(p.t, err)
	p.await(readers, eventstore.Position(head))
	listening.Wait()
	cancel()
	reading.Wait()
	last := p.current()
	stats := addStats(p.past, last.Stats())
	require.NoError(p.t, last.Close())
	counts, err := json.Marshal(stats)
	require.NoError(p.t, err)
	say(chaosDone, string(counts))
}

// await returns when the readers have come to the end.
func (p *chaosProcess) await(readers []*chaosReader, head eventstore.Position) {
	timer := time.NewTimer(2 * waiting)
	defer timer.Stop()
	for _, r := range readers {
		for {
			through, moved, ended := r.at()
			if through >= head || ended {
				break
			}
			select {
			case <-moved:
				continue
			case <-timer.C:
				p.complain(0, 0, "reader %s has come to position %d, and not to %d", r.name, through, head)
			}
			return
		}
	}
}

// note writes a claim down before anything else is done.
func (p *chaosProcess) note(c claim) {
	line, err := json.Marshal(c)
	if err == nil {
		_, err = p.claims.Write(append(line, '\n'))
	}
	if err != nil {
		p.t.Errorf("note %+v: %v", c, err)
	}
}

func (p *chaosProcess) complain(writer, n int, format string, args ...any) {
	p.note(claim{Writer: writer, N: n, Outcome: claimComplaint, Why: fmt.Sprintf(format, args...)})
}

// chaosReader is a subscription that writes down what it sees.
type chaosReader struct {
	p     *chaosProcess
	name  string
	query eventstore.Query
	file  *os.File

	mu      sync.Mutex
	through eventstore.Position
	moved   chan struct{}
	ended   bool
}

// chaosSome is the query of the filtered readers; isSome says the same in
// other words.
var chaosSome = eventstore.Match(eventstore.Item{Category: "hot"}, eventstore.Item{Tags: []string{"counter:1"}})

func isSome(e *chaosRow) bool {
	return strings.HasPrefix(e.stream, "hot-") || slices.Contains(e.tags, "counter:1")
}

func (p *chaosProcess) reader(name string, q eventstore.Query) *chaosReader {
	return &chaosReader{p: p, name: name, query: q, file: appendTo(p.t, p.plan, "."+name+seenFile), moved: make(chan struct{})}
}

func (r *chaosReader) at() (eventstore.Position, <-chan struct{}, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.through, r.moved, r.ended
}

func (r *chaosReader) move(through eventstore.Position, ended bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.through, r.ended = through, ended
	close(r.moved)
	r.moved = make(chan struct{})
}

func (r *chaosReader) follow(ctx context.Context, s *Store, after eventstore.Position) {
	buffer := binary.BigEndian.AppendUint64(nil, uint64(after))
	through := after
	defer func() { r.move(through, true) }()
	for b, err := range s.Subscribe(ctx, r.query, after) {
		if err != nil {
			if ctx.Err() == nil && !(r.p.plan.Careless && errors.Is(err, eventstore.ErrClosed)) {
				r.p.complain(0, 0, "reader %s ended at position %d: %v", r.name, through, err)
			}
			break
		}
		for i := range b.Events {
			if e := &b.Events[i]; e.Position > b.Through || e.Position <= through {
				r.p.complain(0, 0, "reader %s: position %d came with a batch from %d through %d", r.name, e.Position, through, b.Through)
			}
			buffer = appendSeen(buffer, uint64(b.Events[i].Position), b.Events[i].ID)
		}
		if _, err := r.file.Write(buffer); err != nil {
			r.p.t.Errorf("note what reader %s has seen: %v", r.name, err)
			return
		}
		buffer = buffer[:0]
		through = b.Through
		r.move(through, false)
	}
}

// chaosWriter does one append after another, as different as they come.
type chaosWriter struct {
	p      *chaosProcess
	id, n  int
	random *rand.Rand
	own    eventstore.Stream
	at     eventstore.Revision // of its own stream
	hot    map[eventstore.Stream]eventstore.Revision
	used   []string // keys
}

func newChaosWriter(p *chaosProcess, id int) *chaosWriter {
	return &chaosWriter{
		p: p, id: id, random: rand.New(rand.NewPCG(p.plan.Seed, uint64(id))),
		hot: map[eventstore.Stream]eventstore.Revision{},
	}
}

func (w *chaosWriter) run() {
	for !w.p.stop.Load() {
		dice := w.random.IntN(100)
		if w.p.plan.Keyless && dice >= 70 && dice < 90 {
			dice -= 70
		}
		switch {
		case dice < 20:
			w.appendOwn()
		case dice < 25:
			w.appendBeside()
		case dice < 45:
			w.appendHot()
		case dice < 55:
			w.appendBlindly()
		case dice < 70:
			w.appendMany()
		case dice < 80:
			w.appendKeyed()
		case dice < 90:
			w.appendShared()
		case dice < 95:
			w.takeSeat()
		default:
			w.moveCounter()
		}
	}
}

// begin makes the next commit, with an event for each of the streams.
func (w *chaosWriter) begin(streams ...eventstore.Stream) eventstore.Commit {
	name := fmt.Sprintf("%s/%d/%d", w.p.plan.Name, w.id, w.n)
	var c eventstore.Commit
	for i, s := range streams {
		data, _ := json.Marshal(chaosMark{Commit: name, N: i + 1, Of: len(streams)})
		c.Events = append(c.Events, eventstore.Event{ID: uuid.Must(uuid.NewV7()), Stream: s, Type: "marked", Data: data})
	}
	return c
}

// appendOwn follows the writer's own stream by the last receipt.
func (w *chaosWriter) appendOwn() {
	w.mine()
	c := w.begin(slices.Repeat([]eventstore.Stream{w.own}, 1+w.random.IntN(3))...)
	w.follow(under(c, eventstore.StreamAt(w.own, w.at)))
}

// appendBeside appends to a stream of its own while another one, which it does
// not write, is as it was read.
func (w *chaosWriter) appendBeside() {
	s := eventstore.Stream{Category: "hot", ID: fmt.Sprint(w.random.IntN(4))}
	at := w.revision(s)
	c := w.begin(eventstore.Stream{Category: "beside", ID: fmt.Sprintf("%s.%d", w.p.plan.Name, w.id)})
	w.mark(&c, func(m *chaosMark) { m.Beside, m.At = s.String(), int64(at.Version) })
	w.append(under(c, eventstore.StreamAt(s, at)))
}

// mine picks the writer's own stream: a new one now and then.
func (w *chaosWriter) mine() {
	if w.own.IsZero() || w.at.Version > 20 {
		w.own = eventstore.Stream{Category: "own", ID: fmt.Sprintf("%s.%d.%d", w.p.plan.Name, w.id, w.n)}
		w.at = eventstore.Revision{}
	}
}

// follow appends to the writer's own stream, where nobody is in its way.
func (w *chaosWriter) follow(c eventstore.Commit) {
	n := w.n
	got := w.append(c)
	switch got.Outcome {
	case claimAck:
		w.at = eventstore.Revision{Version: w.at.Version}
		for i := range c.Events {
			if c.Events[i].Stream == w.own {
				w.at.Version++
				w.at.Position = eventstore.Position(got.First) + eventstore.Position(i)
			}
		}
	case claimRefused:
		if got.Why == chaosConflict {
			w.p.complain(w.id, n, "a conflict at %v of %s, where nobody else writes", w.at, w.own)
			w.own = eventstore.Stream{}
		}
	}
}

// appendHot writes where everybody does: with an expectation that it has read
// just now or keeps from the last time, and again when somebody was faster.
func (w *chaosWriter) appendHot() {
	s := eventstore.Stream{Category: "hot", ID: fmt.Sprint(w.random.IntN(4))}
	at, known := w.hot[s]
	for try := 0; try < 5 && !w.p.stop.Load(); try++ {
		if !known || w.random.IntN(4) == 0 {
			at = w.revision(s)
		}
		got := w.append(under(w.begin(slices.Repeat([]eventstore.Stream{s}, 1+w.random.IntN(2))...), eventstore.StreamAt(s, at)))
		if known = got.Outcome == claimAck; known {
			w.hot[s] = eventstore.Revision{Version: at.Version + uint64(len(got.IDs)), Position: eventstore.Position(got.Last)}
			return
		}
	}
	delete(w.hot, s)
}

func (w *chaosWriter) appendBlindly() {
	c := w.begin(eventstore.Stream{Category: "any", ID: fmt.Sprint(w.random.IntN(50))})
	if w.random.IntN(2) == 0 {
		c.Events[0].Tags = []string{fmt.Sprintf("any:%d", w.random.IntN(20)), "plain"}
	}
	w.append(c)
}

// appendMany writes several streams at once, its own among them.
func (w *chaosWriter) appendMany() {
	w.mine()
	streams := []eventstore.Stream{w.own}
	for range 1 + w.random.IntN(4) {
		streams = append(streams, eventstore.Stream{Category: "shared", ID: fmt.Sprint(w.random.IntN(10))})
	}
	streams = append(streams, w.own)
	w.random.Shuffle(len(streams), func(i, j int) { streams[i], streams[j] = streams[j], streams[i] })
	c := w.begin(streams...)
	if !w.p.plan.Keyless && w.random.IntN(3) == 0 {
		c.Key = fmt.Sprintf("%s/%d/%d", w.p.plan.Name, w.id, w.n)
	}
	w.follow(under(c, eventstore.StreamAt(w.own, w.at)))
}

// appendKeyed uses a key, often a second time, and sometimes one that was used
// for something else.
func (w *chaosWriter) appendKeyed() {
	n := w.n
	c := w.begin(eventstore.Stream{Category: "keyed", ID: fmt.Sprint(w.random.IntN(50))})
	if len(w.used) > 0 && w.random.IntN(5) == 0 {
		c.Key = w.used[w.random.IntN(len(w.used))]
		if got := w.append(c); got.Outcome != claimRefused {
			w.p.complain(w.id, n, "key %q was taken for something else: %+v", c.Key, got)
		}
		return
	}
	c.Key = fmt.Sprintf("%s/%d/%d", w.p.plan.Name, w.id, w.n)
	first := w.append(c)
	if first.Outcome != claimAck {
		return
	}
	w.used = append(w.used, c.Key)
	for w.random.IntN(2) == 0 {
		again := w.answer(c, false)
		if again.Outcome != claimAck || again.Why != chaosWasThere {
			w.p.complain(w.id, n, "the second append with key %q: %+v", c.Key, again)
			return
		}
		again.Writer, again.N, again.Outcome, again.Why = w.id, n, claimAgain, ""
		w.p.note(again)
	}
}

// appendShared uses a key that writers of all processes use: whoever comes
// first writes, for the others it was written, whatever their conditions are.
func (w *chaosWriter) appendShared() {
	number := w.p.head.Load()/40 + w.random.Uint64N(3)
	s := eventstore.Stream{Category: "once", ID: fmt.Sprint(number)}
	c := w.begin(s)
	c.Key, c.Fingerprint = fmt.Sprintf("shared/%d", number), "shared"
	if w.random.IntN(2) == 0 {
		c = under(c, eventstore.StreamAt(s, eventstore.Revision{}))
	}
	n := w.n
	if got := w.append(c); got.Why == chaosConflict {
		w.p.complain(w.id, n, "a conflict with the commit that has used the key %q", c.Key)
	}
}

// takeSeat appends if nobody has the seat: a boundary over two tags.
func (w *chaosWriter) takeSeat() {
	seat := w.p.head.Load()/20 + w.random.Uint64N(8)
	tags := []string{fmt.Sprintf("show:%d", seat%7), fmt.Sprintf("seat:%d", seat)}
	q := eventstore.Match(eventstore.Item{Types: []string{"taken"}, Tags: tags})
	after := eventstore.Position(0)
	if w.random.IntN(2) == 0 {
		// Look first, and then rely on what was seen.
		var head eventstore.Position
		if !w.tryRead(func(s *Store) (err error) { head, err = s.Head(context.Background()); return err }) {
			return
		}
		if _, taken := w.latest(q, head); taken {
			return
		}
		after = head
	}
	c := w.begin(eventstore.Stream{Category: "show", ID: fmt.Sprint(seat % 7)})
	c.Events[0].Type, c.Events[0].Tags = "taken", tags
	w.mark(&c, func(m *chaosMark) { m.After = new(int64) })
	w.append(under(c, eventstore.NoneMatch(q, after)))
}

// moveCounter appends if nobody else has moved the counter since it was read.
func (w *chaosWriter) moveCounter() {
	tags := []string{fmt.Sprintf("counter:%d", w.random.IntN(4))}
	q := eventstore.Match(eventstore.Item{Types: []string{"moved"}, Tags: tags})
	for try := 0; try < 3 && !w.p.stop.Load(); try++ {
		last, _ := w.latest(q, 0)
		c := w.begin(eventstore.Stream{Category: "counter", ID: fmt.Sprintf("%s.%d", w.p.plan.Name, w.id)})
		c.Events[0].Type, c.Events[0].Tags = "moved", tags
		after := int64(last.Position)
		w.mark(&c, func(m *chaosMark) { m.After = &after })
		if got := w.append(under(c, eventstore.NoneMatch(q, last.Position))); got.Outcome == claimAck {
			return
		}
	}
}

// mark writes into the first event what its condition is.
func (w *chaosWriter) mark(c *eventstore.Commit, with func(*chaosMark)) {
	var m chaosMark
	_ = json.Unmarshal(c.Events[0].Data, &m)
	with(&m)
	c.Events[0].Data, _ = json.Marshal(m)
}

// Why commits are refused.
const (
	chaosConflict  = "conflict"
	chaosReused    = "key reused"
	chaosCancelled = "cancelled"
	chaosClosed    = "closed"
	chaosWasThere  = "it was there" // of an answer: the receipt said duplicate
)

// append appends the commit, whatever it takes to know what became of it, and
// notes that.
func (w *chaosWriter) append(c eventstore.Commit) claim {
	got := w.answer(c, repeatable(c) && w.random.IntN(20) == 0)
	got.Writer, got.N = w.id, w.n
	if got.Outcome == claimAck && got.Why == chaosWasThere && got.Resolved == "" {
		w.p.complain(w.id, w.n, "it was written already, although every answer before was that nothing was")
	}
	w.n++
	w.p.note(got)
	return got
}

// repeatable reports whether the commit may be sent again before it is known
// not to be there: it has a key, or a condition that it would break itself.
func repeatable(c eventstore.Commit) bool {
	return c.Key != "" || slices.ContainsFunc(c.Conditions, func(k eventstore.Condition) bool {
		return k.Kind == eventstore.ConditionNoneMatch ||
			slices.ContainsFunc(c.Events, func(e eventstore.Event) bool { return e.Stream == k.Stream })
	})
}

// answer does what a careful user does. In a hurry the first attempt is given
// little time, so that its outcome is often not known.
func (w *chaosWriter) answer(c eventstore.Commit, hurry bool) claim {
	got := claim{Key: c.Key}
	for i := range c.Events {
		got.IDs = append(got.IDs, c.Events[i].ID)
	}
	unknown := false
	refused := func(why string) claim {
		got.Outcome, got.Why = claimRefused, why
		return got
	}
	for ; ; hurry = false {
		if w.p.plan.Careless && w.p.stop.Load() {
			return refused("given up") // on such a log there may never be an answer
		}
		ctx, cancel := context.Background(), func() {}
		if hurry {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(1+w.random.IntN(20_000))*time.Microsecond)
		}
		s := w.p.current()
		r, err := s.Append(ctx, c)
		cancel()
		switch {
		case err == nil:
			return w.acknowledged(c, r, unknown, got)
		case errors.Is(err, eventstore.ErrOutcomeUnknown):
			unknown = true
			if errors.Is(err, context.DeadlineExceeded) {
				got.Cut++
			} else {
				got.Lost++
			}
			if !repeatable(c) {
				// It was not in a hurry, so it is not on its way any more.
				if w.found(c, &got) {
					return got
				}
				unknown = false
			}
		case errors.Is(err, eventstore.ErrConflict):
			if unknown && w.found(c, &got) {
				return got // with itself
			}
			return refused(chaosConflict)
		case errors.Is(err, eventstore.ErrKeyReused):
			return refused(chaosReused)
		case hurry && !unknown && errors.Is(err, ctx.Err()):
			return refused(chaosCancelled)
		case errors.Is(err, eventstore.ErrClosed) && w.p.plan.Careless:
		case errors.Is(err, eventstore.ErrClosed):
			return refused(chaosClosed)
		case errors.Is(err, eventstore.ErrGap) && w.p.plan.Careless:
			w.p.reopen(s)
		case !eventstore.CanRetry(err):
			w.p.complain(w.id, w.n, "append: %v", err)
			w.p.stop.Store(true)
			return refused(err.Error())
		}
		if errors.Is(err, eventstore.ErrGap) && w.p.plan.Careless {
			w.p.reopen(s)
		}
		if !hurry {
			time.Sleep(time.Duration(1+w.random.IntN(20)) * time.Millisecond)
		}
	}
}

func (w *chaosWriter) acknowledged(c eventstore.Commit, r eventstore.Receipt, unknown bool, got claim) claim {
	got.Outcome, got.First, got.Last = claimAck, int64(r.First), int64(r.Last)
	for _, s := range r.Revisions {
		got.Revisions = append(got.Revisions, claimedRevision{s.Stream.String(), int64(s.Revision.Version), int64(s.Revision.Position)})
	}
	w.reached(r.Last)
	if unknown {
		got.Resolved = "again"
	}
	if r.Duplicate {
		got.Why = chaosWasThere
		if unknown {
			got.Resolved = "key"
		}
		// Whose is it? The writer's own, unless others use the key.
		if c.Fingerprint != "" && w.idAt(r.First) != c.Events[0].ID {
			got.Outcome, got.Resolved = claimDuplicate, ""
		}
	}
	return got
}

func (w *chaosWriter) reached(p eventstore.Position) {
	for {
		head := w.p.head.Load()
		if head >= uint64(p) {
			return
		}
		if w.p.head.CompareAndSwap(head, uint64(p)) {
			if head < 100 && p >= 100 {
				close(w.p.far)
			}
			return
		}
	}
}

// found looks for the commit in the log.
func (w *chaosWriter) found(c eventstore.Commit, got *claim) bool {
	there := false
	w.tryRead(func(s *Store) error {
		for e, err := range s.Read(context.Background(), eventstore.OneStream(c.Events[0].Stream), eventstore.ReadOptions{}) {
			if err != nil {
				return err
			}
			if e.ID == c.Events[0].ID {
				got.Outcome, got.Resolved = claimAck, "stream"
				got.First, got.Last = int64(e.Position), int64(e.Position)+int64(len(c.Events))-1
				there = true
			}
		}
		return nil
	})
	return there
}

func (w *chaosWriter) idAt(p eventstore.Position) (id uuid.UUID) {
	w.tryRead(func(s *Store) error {
		for e, err := range s.Read(context.Background(), eventstore.All(), eventstore.ReadOptions{After: p - 1, Through: p}) {
			if err != nil {
				return err
			}
			id = e.ID
		}
		return nil
	})
	return id
}

func (w *chaosWriter) revision(s eventstore.Stream) eventstore.Revision {
	last, _ := w.latest(eventstore.OneStream(s), 0)
	return last.Revision()
}

// latest returns the last event that matches, up to the position.
func (w *chaosWriter) latest(q eventstore.Query, through eventstore.Position) (last eventstore.Recorded, any bool) {
	w.tryRead(func(s *Store) error {
		last, any = eventstore.Recorded{}, false
		for e, err := range s.Read(context.Background(), q, eventstore.ReadOptions{Backward: true, Limit: 1, Through: through}) {
			if err != nil {
				return err
			}
			last, any = e, true
		}
		return nil
	})
	return last, any
}

// tryRead reads until the database answers.
func (w *chaosWriter) tryRead(read func(*Store) error) bool {
	for {
		s := w.p.current()
		err := read(s)
		switch {
		case err == nil:
			return true
		case w.p.plan.Careless && (w.p.stop.Load() || errors.Is(err, eventstore.ErrGap)):
			return false
		case w.p.plan.Careless && errors.Is(err, eventstore.ErrClosed):
		case !eventstore.CanRetry(err):
			w.p.complain(w.id, w.n, "read: %v", err)
			return false
		}
		time.Sleep(time.Duration(1+w.random.IntN(20)) * time.Millisecond)
	}
}
