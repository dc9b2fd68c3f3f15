package workload

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// subscriber sees the events of one stream, here or elsewhere.
type subscriber struct {
	stop  func() error // ends what feeds it, which then closes sightings
	ended chan struct{}
	grown chan struct{} // holds a token when there is more

	mu   sync.Mutex
	seen map[eventstore.Position]int64
}

// collect takes down what is seen until there is no more.
func (s *subscriber) collect(sightings <-chan sighting) {
	defer close(s.ended)
	for one := range sightings {
		s.mu.Lock()
		if _, twice := s.seen[one.position]; !twice {
			s.seen[one.position] = one.at
		}
		s.mu.Unlock()
		select {
		case s.grown <- struct{}{}:
		default:
		}
	}
}

// finish waits until n events were seen, but not for ever, and ends the
// subscription.
func (s *subscriber) finish(n int) (map[eventstore.Position]int64, error) {
	late := time.NewTimer(lastSightings)
	defer late.Stop()
	for waiting := true; waiting; {
		s.mu.Lock()
		waiting = len(s.seen) < n
		s.mu.Unlock()
		if waiting {
			select {
			case <-s.grown:
			case <-s.ended:
				waiting = false
			case <-late.C:
				waiting = false
			}
		}
	}
	err := s.stop()
	<-s.ended
	return s.seen, err
}

// subscribe returns when the subscriber has come to the head.
func (w *Live) subscribe(ctx context.Context, b *bench, stream eventstore.Stream, after eventstore.Position) (*subscriber, error) {
	s := &subscriber{ended: make(chan struct{}), grown: make(chan struct{}, 1), seen: map[eventstore.Position]int64{}}
	sightings, ready := make(chan sighting, 1024), make(chan struct{})
	if w.OtherProcess {
		if err := s.spawn(ctx, b, stream, after, sightings); err != nil {
			return nil, err
		}
		return s, nil
	}
	store, release := b.store, func() error { return nil }
	if w.Listen {
		second, err := b.Opener.Open(ctx)
		if err != nil {
			return nil, fmt.Errorf("open the store a second time: %w", err)
		}
		store, release = second, func() error { return closeStore(second) }
	}
	following, cancel := context.WithCancel(context.WithoutCancel(ctx))
	failed := make(chan error, 1)
	go func() {
		defer close(sightings)
		failed <- follow(following, store, stream, after, func() { close(ready) }, func(one sighting) { sightings <- one })
	}()
	go s.collect(sightings)
	s.stop = func() error {
		cancel()
		err := <-failed
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		return errors.Join(err, release())
	}
	select {
	case <-ready:
		return s, nil
	case <-s.ended:
	case <-ctx.Done():
	}
	return nil, errors.Join(errors.New("the subscriber did not come to the head of the log"), s.stop(), ctx.Err())
}

// follow subscribes to the stream and tells what it sees, and when.
func follow(ctx context.Context, store eventstore.Store, stream eventstore.Stream, after eventstore.Position, ready func(), saw func(sighting)) error {
	caughtUp := false
	for batch, err := range store.Subscribe(ctx, eventstore.OneStream(stream), after) {
		if err != nil {
			return err
		}
		at := stamp()
		for i := range batch.Events {
			saw(sighting{batch.Events[i].Position, at})
		}
		if batch.CaughtUp && !caughtUp {
			caughtUp = true
			ready()
		}
	}
	return ctx.Err()
}

// assignment is what the other process is told, as one line of JSON.
type assignment struct {
	Store  string              `json:"store"`
	Stream string              `json:"stream"`
	After  eventstore.Position `json:"after"`
}

// Between the processes: one line of JSON there; back, "ready" once, and then
// "position stamp" for each event. The other process ends when its input does, so
// it never outlives this one.
const readyLine = "ready"

// spawn starts the other process.
func (s *subscriber) spawn(ctx context.Context, b *bench, stream eventstore.Stream, after eventstore.Position, sightings chan sighting) error {
	if b.Other == nil {
		return fmt.Errorf("another process: %w by this program", errors.ErrUnsupported)
	}
	child, err := b.Other()
	if err != nil {
		return fmt.Errorf("another process: %w", err)
	}
	var complaints bytes.Buffer
	child.Stderr = &complaints
	in, err := child.StdinPipe()
	if err != nil {
		return err
	}
	out, err := child.StdoutPipe()
	if err != nil {
		return err
	}
	child.WaitDelay = patience
	if err := child.Start(); err != nil {
		return fmt.Errorf("start another process: %w", err)
	}
	failed := make(chan error, 1)
	ready := make(chan struct{})
	go func() {
		defer close(sightings)
		failed <- readSightings(out, func() { close(ready) }, func(one sighting) { sightings <- one })
		_, _ = io.Copy(io.Discard, out) // so that it never waits to be heard
	}()
	go s.collect(sightings)
	s.stop = func() error {
		_ = in.Close() // tells it to end
		killer := time.AfterFunc(patience, func() { _ = child.Process.Kill() })
		defer killer.Stop()
		reading := <-failed
		return errors.Join(reading, ended(child, &complaints))
	}
	text, err := json.Marshal(assignment{Store: b.Address, Stream: stream.String(), After: after})
	if err == nil {
		_, err = in.Write(append(text, '\n'))
	}
	if err == nil {
		select {
		case <-ready:
			return nil
		case <-s.ended:
			err = errors.New("it ended before it had come to the head of the log")
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	return fmt.Errorf("another process: %w", errors.Join(err, s.stop()))
}

// ended waits for the process and says what it complained about.
func ended(child *exec.Cmd, complaints *bytes.Buffer) error {
	err := child.Wait()
	if text := strings.TrimSpace(complaints.String()); err != nil && text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

func readSightings(from io.Reader, ready func(), saw func(sighting)) error {
	lines := bufio.NewScanner(from)
	told := false
	for lines.Scan() {
		line := lines.Text()
		if line == readyLine && !told {
			told = true
			ready()
			continue
		}
		first, second, _ := strings.Cut(line, " ")
		position, err := strconv.ParseUint(first, 10, 64)
		if err == nil {
			var at int64
			if at, err = strconv.ParseInt(second, 10, 64); err == nil {
				saw(sighting{eventstore.Position(position), at})
			}
		}
		if err != nil {
			return fmt.Errorf("the other process says %q: %w", line, err)
		}
	}
	return lines.Err()
}

// Listen is the other process of a [Live] run: it reads from in what to
// subscribe to, writes to out what it sees and when, and ends when in does.
func Listen(ctx context.Context, open func(ctx context.Context, address string) (eventstore.Opener, error), in io.Reader, out io.Writer) (err error) {
	lines := bufio.NewReader(in)
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read what to subscribe to: %w", err)
	}
	var a assignment
	if err := json.Unmarshal(line, &a); err != nil {
		return fmt.Errorf("read what to subscribe to: %w", err)
	}
	stream, err := eventstore.ParseStream(a.Stream)
	if err != nil {
		return err
	}
	source, err := open(ctx, a.Store)
	if err != nil {
		return err
	}
	store, err := source.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeStore(store)) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// It ends with the process: nothing interrupts reading from a pipe.
	go func() {
		defer cancel()
		_, _ = io.Copy(io.Discard, lines)
	}()
	told := bufio.NewWriter(out)
	tell := func(line string) {
		_, _ = told.WriteString(line)
		if told.Flush() != nil {
			cancel() // nobody listens
		}
	}
	err = follow(ctx, store, stream, a.After,
		func() { tell(readyLine + "\n") },
		func(one sighting) { tell(fmt.Sprintf("%d %d\n", one.position, one.at)) })
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}
