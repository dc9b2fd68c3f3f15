// Package eventstoredb is the driver over EventStoreDB's official client for
// Go, whose defects it keeps from its callers. It may import the packages
// beside it and the client.
//
// The client hands out its connection through one goroutine: when the search
// for a server fails while several callers wait, one of them gets the error,
// the others hang for ever, and the client is dead for good. So each client is
// a generation of a supervisor's. The first search is made by one call that
// nobody shares, and a client is never allowed to make a second one: the moment
// it finds its server gone, before it could tell its goroutine so, it is closed
// to further calls, and a new client is made. Should a client hang all the same,
// callers return with their contexts, and the goroutines that hang are ended
// when the client is closed.
package eventstoredb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/eventstore/esdb/internal/driver"
	"github.com/deed-go/deed/eventstore/esdb/internal/supervisor"
)

type (
	generation = supervisor.Generation[*esdb.Client]
	pool       = supervisor.Supervisor[*esdb.Client]
)

// Driver speaks to the server that a connection string names.
type Driver struct {
	config esdb.Configuration
	pool   *pool
	log    *slog.Logger
	leader atomic.Pointer[string] // where a follower has sent us

	silence time.Duration
}

var _ driver.Driver = (*Driver)(nil)

const (
	// searchWindow is how many events the server looks at between two checkpoints.
	searchWindow = 512
	// ahead is how many events are received before they are asked for.
	ahead = 64
	// silence is for how long a call is answered by nothing, not even by the loss of
	// its connection, before another client is made.
	silence = 5 * time.Second
	// grace is how long Close waits for calls that hang in the client.
	grace = 2 * time.Second
)

// New checks the connection string; it does not connect yet.
func New(url string, log *slog.Logger) (*Driver, error) {
	config, err := esdb.ParseConnectionString(url)
	if err != nil {
		return nil, err
	}
	if err := config.Validate(); err != nil {
		return nil, err
	}
	// The supervisor tries again, with pauses.
	config.MaxDiscoverAttempts, config.DiscoveryInterval = 1, 1
	d := &Driver{config: *config, log: log, silence: silence}
	d.pool = supervisor.New(supervisor.Config[*esdb.Client]{
		Connect: d.connect,
		Close:   func(c *esdb.Client) { _ = c.Close() },
		Backoff: func(n int) time.Duration { return min(10*time.Millisecond<<min(n, 10), 250*time.Millisecond) },
		Grace:   grace,
	})
	return d, nil
}

// connect makes a client and lets it find its server.
func (d *Driver) connect(g *generation) (*esdb.Client, error) {
	config := d.config
	if leader := d.leader.Swap(nil); leader != nil {
		config.Address, config.DnsDiscover, config.GossipSeeds = *leader, false, nil
	}
	config.Logger = func(level esdb.LogLevel, format string, args ...any) { d.listen(g, level, format, args) }
	client, err := esdb.NewClient(&config)
	if err != nil {
		return nil, err
	}
	if _, err := client.GetServerVersion(); err != nil {
		_ = client.Close()
		return nil, err
	}
	return client, nil
}

// listen hears what the client says. Before it tells its goroutine to look for
// a server again it reports the error: from here on nobody uses it any more.
func (d *Driver) listen(g *generation, level esdb.LogLevel, format string, args []any) {
	for _, arg := range args {
		switch arg := arg.(type) {
		case error:
			if strings.HasPrefix(format, "unexpected exception") && status.Code(arg) == codes.Unavailable {
				g.Break()
			}
		case esdb.EndPoint:
			if strings.HasPrefix(format, "not leader") {
				leader := arg.String()
				d.leader.Store(&leader)
				g.Break()
			}
		}
	}
	if d.log != nil {
		at := slog.LevelDebug
		if level == esdb.LogError || level == esdb.LogWarn {
			at = slog.LevelInfo
		}
		d.log.Log(context.Background(), at, "eventstoredb client: "+fmt.Sprintf(format, args...))
	}
}

// Generations returns how many clients were made.
func (d *Driver) Generations() int { return d.pool.Generations() }

// Close implements driver.Driver.
func (d *Driver) Close() error { return d.pool.Close() }

// passing tells when the client has a connection for a call: it is then that it
// asks for the deadline.
type passing struct {
	context.Context
	passed func()
}

func (p passing) Deadline() (time.Time, bool) {
	p.passed()
	return p.Context.Deadline()
}

// do runs one call of the client's that ends by itself.
func (d *Driver) do(ctx context.Context, fn func(context.Context, *esdb.Client) error) error {
	var failure error // belongs to fn until Do says that it has returned
	type use struct {
		*generation
		since time.Time
	}
	var used atomic.Pointer[use]
	called, err := d.pool.Do(ctx, func(g *generation, client *esdb.Client, started func()) {
		used.Store(&use{g, time.Now()})
		inner, cancel := d.within(ctx)
		defer cancel()
		err := classify(fn(passing{inner, started}, client))
		started()
		d.judge(g, err)
		if ctx.Err() == nil {
			failure = err
		}
	})
	switch {
	case ctx.Err() != nil:
		if u := used.Load(); u != nil && time.Since(u.since) > d.silence {
			u.Failed(fmt.Errorf("no answer for %s", time.Since(u.since))) // the connection may be dead without a word
		}
		return &driver.Error{Kind: driver.Ended, Unsent: !called, Err: because(ctx, err)}
	case err == nil:
		return failure
	case errors.Is(err, supervisor.ErrClosed):
		return fmt.Errorf("%w: %w", driver.ErrClosed, &driver.Error{Kind: driver.Unavailable, Unsent: !called, Err: err})
	default:
		return &driver.Error{Kind: driver.Unknown, Unsent: !called, Err: err}
	}
}

// because returns the cause of the context's end, with what else is known.
func because(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	switch {
	case err == nil || errors.Is(cause, err):
		return cause
	case errors.Is(err, cause):
		return err
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// within returns a context that ends with the driver too.
func (d *Driver) within(ctx context.Context) (context.Context, context.CancelFunc) {
	inner, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(d.pool.Base(), cancel)
	return inner, func() { stop(); cancel() }
}

// judge breaks the generation when its server has gone.
func (d *Driver) judge(g *generation, err error) {
	switch driver.KindOf(err) {
	case driver.Unavailable:
		g.Failed(err)
	case driver.Ended, driver.Unknown, driver.Timeout, driver.Aborted:
		if err == nil {
			g.Succeeded()
		}
	default: // the server has answered
		g.Succeeded()
	}
}

// classify makes the client's errors typed ones.
func classify(err error) error {
	if err == nil {
		return nil
	}
	kind, unsent := driver.Unknown, false
	if e, ok := errors.AsType[*esdb.Error](err); ok {
		switch e.Code() {
		case esdb.ErrorCodeWrongExpectedVersion:
			kind = driver.WrongVersion
		case esdb.ErrorCodeResourceNotFound:
			kind = driver.NotFound
		case esdb.ErrorCodeStreamDeleted:
			kind = driver.Deleted
		case esdb.ErrorCodeUnauthenticated, esdb.ErrorCodeAccessDenied:
			kind = driver.Denied
		case esdb.ErrorCodeDeadlineExceeded:
			kind = driver.Timeout
		case esdb.ErrorCodeConnectionClosed, esdb.ErrorCodeNotLeader:
			kind, unsent = driver.Unavailable, true
		case esdb.ErrorUnavailable:
			kind = driver.Unavailable
		case esdb.ErrorAborted:
			kind = driver.Aborted
		}
	}
	if kind == driver.Unknown {
		kind = classifyStatus(err)
	}
	return &driver.Error{Kind: kind, Unsent: unsent, Err: err}
}

// classifyStatus looks at the gRPC status within the error.
func classifyStatus(err error) driver.Kind {
	s, ok := status.FromError(err)
	if !ok {
		if errors.Is(err, io.EOF) && strings.Contains(err.Error(), "could not send") {
			return driver.Rejected // before the last message was sent
		}
		return driver.Unknown
	}
	text := strings.ToLower(s.Message())
	switch s.Code() {
	case codes.InvalidArgument, codes.Unknown: // by version; other messages may quote what callers have chosen
		if strings.Contains(strings.ReplaceAll(text, " ", ""), "invalidposition") {
			return driver.InvalidPosition
		}
	}
	switch s.Code() {
	case codes.FailedPrecondition:
		if strings.Contains(strings.ReplaceAll(text, " ", ""), "wrongexpectedversion") || strings.Contains(text, "expected version") {
			return driver.WrongVersion
		}
		return driver.Deleted
	case codes.InvalidArgument, codes.ResourceExhausted:
		return driver.TooLarge
	case codes.Canceled:
		return driver.Ended
	case codes.DeadlineExceeded:
		return driver.Timeout
	case codes.Unavailable:
		return driver.Unavailable
	case codes.Aborted:
		return driver.Aborted
	case codes.NotFound:
		return driver.NotFound
	case codes.PermissionDenied, codes.Unauthenticated:
		return driver.Denied
	case codes.Unknown:
		if strings.Contains(text, "no leader info") {
			return driver.Aborted // the nodes are choosing one
		}
	case codes.Internal:
		if strings.Contains(text, "rst_stream") || strings.Contains(text, "stream terminated") {
			return driver.Aborted // the connection broke
		}
	}
	return driver.Unknown
}

func expectation(e driver.Expected) esdb.ExpectedRevision {
	switch e {
	case driver.NoStream:
		return esdb.NoStream{}
	case driver.Any:
		return esdb.Any{}
	case driver.StreamExists:
		return esdb.StreamExists{}
	}
	return esdb.Revision(uint64(e))
}

// Append implements driver.Driver.
func (d *Driver) Append(ctx context.Context, stream string, expected driver.Expected, events []driver.Event) (driver.Appended, error) {
	if len(events) == 0 {
		// The client would report revision 1 for a stream that does not exist.
		return driver.Appended{}, &driver.Error{Unsent: true, Err: errors.New("nothing to append")}
	}
	proposed := make([]esdb.EventData, len(events))
	for i, e := range events {
		proposed[i] = esdb.EventData{EventID: e.ID, EventType: e.Type, Data: e.Data, Metadata: e.Metadata}
		if e.JSON {
			proposed[i].ContentType = esdb.ContentTypeJson
		}
	}
	options := esdb.AppendToStreamOptions{ExpectedRevision: expectation(expected)}
	if at, ok := ctx.Deadline(); ok {
		left := time.Until(at) // else the client has a deadline of its own
		options.Deadline = &left
	}
	out := make(chan driver.Appended, 1)
	err := d.do(ctx, func(ctx context.Context, client *esdb.Client) error {
		r, err := client.AppendToStream(ctx, stream, options, proposed...)
		if err == nil {
			out <- driver.Appended{Revision: r.NextExpectedVersion, Position: driver.Position{Commit: r.CommitPosition, Prepare: r.PreparePosition}}
		}
		return err
	})
	switch {
	case driver.KindOf(err) == driver.Rejected:
		return driver.Appended{}, d.reason(ctx, stream, err)
	case err != nil:
		return driver.Appended{}, err
	}
	return <-out, nil
}

// nowhere is a revision that no stream has.
const nowhere = 1<<63 - 2

// reason finds out why the server ended an append before it had all of it, which
// the client does not tell: one that has no events, and could not be written
// anywhere, is refused for the same reason if that is not the events.
func (d *Driver) reason(ctx context.Context, stream string, rejected error) error {
	err := d.do(ctx, func(ctx context.Context, client *esdb.Client) error {
		_, err := client.AppendToStream(ctx, stream, esdb.AppendToStreamOptions{ExpectedRevision: esdb.Revision(nowhere)})
		return err
	})
	switch driver.KindOf(err) {
	case driver.Denied, driver.Deleted:
		return err
	}
	return rejected
}

// Delete implements driver.Driver.
func (d *Driver) Delete(ctx context.Context, stream string, expected driver.Expected) (driver.Position, error) {
	return d.remove(ctx, func(ctx context.Context, client *esdb.Client) (*esdb.DeleteResult, error) {
		return client.DeleteStream(ctx, stream, esdb.DeleteStreamOptions{ExpectedRevision: expectation(expected)})
	})
}

// Tombstone implements driver.Driver.
func (d *Driver) Tombstone(ctx context.Context, stream string, expected driver.Expected) (driver.Position, error) {
	return d.remove(ctx, func(ctx context.Context, client *esdb.Client) (*esdb.DeleteResult, error) {
		return client.TombstoneStream(ctx, stream, esdb.TombstoneStreamOptions{ExpectedRevision: expectation(expected)})
	})
}

func (d *Driver) remove(ctx context.Context, fn func(context.Context, *esdb.Client) (*esdb.DeleteResult, error)) (driver.Position, error) {
	out := make(chan driver.Position, 1)
	err := d.do(ctx, func(ctx context.Context, client *esdb.Client) error {
		r, err := fn(ctx, client)
		if err == nil {
			out <- driver.Position{Commit: r.Position.Commit, Prepare: r.Position.Prepare}
		}
		return err
	})
	if err != nil {
		return driver.Position{}, err
	}
	return <-out, nil
}

// Metadata implements driver.Driver. It reads the stream that the metadata lies
// in: the client's own call fails where there is none, and rounds numbers.
func (d *Driver) Metadata(ctx context.Context, stream string) ([]byte, error) {
	r, err := d.ReadStream(ctx, "$$"+stream, driver.StreamFrom{End: true}, true, 1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	e, err := r.Next(ctx)
	switch {
	case errors.Is(err, io.EOF), driver.KindOf(err) == driver.NotFound:
		return nil, nil
	case err != nil:
		return nil, err
	}
	return e.Data, nil
}

// SetMetadata implements driver.Driver.
func (d *Driver) SetMetadata(ctx context.Context, stream string, expected driver.Expected, json []byte) error {
	_, err := d.Append(ctx, "$$"+stream, expected, []driver.Event{{ID: uuid.New(), Type: "$metadata", JSON: true, Data: json}})
	return err
}

// ReadStream implements driver.Driver.
func (d *Driver) ReadStream(ctx context.Context, stream string, from driver.StreamFrom, backward bool, count uint64) (driver.Reader, error) {
	options := esdb.ReadStreamOptions{From: streamPosition(from), Direction: direction(backward)}
	return d.read(ctx, from.Leader, func(ctx context.Context, client *esdb.Client) (*esdb.ReadStream, error) {
		return client.ReadStream(ctx, stream, options, count)
	})
}

// ReadAll implements driver.Driver.
func (d *Driver) ReadAll(ctx context.Context, from driver.AllFrom, backward bool, count uint64) (driver.Reader, error) {
	options := esdb.ReadAllOptions{From: allPosition(from), Direction: direction(backward)}
	return d.read(ctx, from.Leader, func(ctx context.Context, client *esdb.Client) (*esdb.ReadStream, error) {
		return client.ReadAll(ctx, options, count)
	})
}

func (d *Driver) read(ctx context.Context, leader bool, open func(context.Context, *esdb.Client) (*esdb.ReadStream, error)) (driver.Reader, error) {
	if leader {
		// The client itself puts it where it is never sent.
		ctx = metadata.AppendToOutgoingContext(ctx, "requires-leader", "true")
	}
	return start(ctx, d, func(ctx context.Context, client *esdb.Client) (func() (*driver.Recorded, error), func(), error) {
		reading, err := open(ctx, client)
		if err != nil {
			return nil, nil, err
		}
		return func() (*driver.Recorded, error) {
			e, err := reading.Recv()
			if err != nil {
				return nil, err
			}
			return recorded(e), nil
		}, reading.Close, nil
	})
}

// SubscribeStream implements driver.Driver.
func (d *Driver) SubscribeStream(ctx context.Context, stream string, after driver.StreamFrom) (driver.Subscription, error) {
	options := esdb.SubscribeToStreamOptions{From: streamPosition(after)}
	return d.subscribe(ctx, func(ctx context.Context, client *esdb.Client) (*esdb.Subscription, error) {
		return client.SubscribeToStream(ctx, stream, options)
	})
}

// SubscribeAll implements driver.Driver.
func (d *Driver) SubscribeAll(ctx context.Context, after driver.AllFrom, filter driver.Filter) (driver.Subscription, error) {
	options := esdb.SubscribeToAllOptions{From: allPosition(after), MaxSearchWindow: searchWindow, CheckpointInterval: 1}
	switch {
	case len(filter.StreamPrefixes) > 0:
		options.Filter = &esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Prefixes: filter.StreamPrefixes}
	case filter.StreamRegex != "":
		options.Filter = &esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Regex: filter.StreamRegex}
	case len(filter.TypePrefixes) > 0:
		options.Filter = &esdb.SubscriptionFilter{Type: esdb.EventFilterType, Prefixes: filter.TypePrefixes}
	}
	return d.subscribe(ctx, func(ctx context.Context, client *esdb.Client) (*esdb.Subscription, error) {
		return client.SubscribeToAll(ctx, options)
	})
}

func (d *Driver) subscribe(ctx context.Context, open func(context.Context, *esdb.Client) (*esdb.Subscription, error)) (driver.Subscription, error) {
	return start(ctx, d, func(ctx context.Context, client *esdb.Client) (func() (driver.Message, error), func(), error) {
		subscription, err := open(ctx, client)
		if err != nil {
			return nil, nil, err
		}
		return func() (driver.Message, error) {
			for {
				m := subscription.Recv()
				switch {
				case m.SubscriptionDropped != nil:
					return driver.Message{}, m.SubscriptionDropped.Error
				case m.EventAppeared != nil:
					return driver.Message{Event: recorded(m.EventAppeared)}, nil
				case m.CheckPointReached != nil:
					return driver.Message{Checkpoint: &driver.Position{Commit: m.CheckPointReached.Commit, Prepare: m.CheckPointReached.Prepare}}, nil
				case m.CaughtUp != nil:
					return driver.Message{CaughtUp: true}, nil
				}
			}
		}, func() { _ = subscription.Close() }, nil
	})
}

// stream hands on what a goroutine of the driver receives.
type stream[T any] struct {
	items  chan item[T]
	cancel context.CancelFunc
	ended  error // what Next has returned at the end
}

type item[T any] struct {
	value T
	err   error
}

// start opens a stream in a goroutine, which then receives until the end: the
// client's Recv knows no context, and can hang.
func start[T any](ctx context.Context, d *Driver, open func(context.Context, *esdb.Client) (func() (T, error), func(), error)) (*stream[T], error) {
	inner, cancel := d.within(ctx)
	s := &stream[T]{items: make(chan item[T], ahead), cancel: cancel}
	put := func(i item[T]) bool {
		select {
		case s.items <- i:
			return true
		case <-inner.Done():
			return false
		}
	}
	err := d.pool.Go(ctx, func(g *generation, client *esdb.Client, started func()) {
		receive, end, err := open(passing{inner, started}, client)
		started()
		if err != nil {
			err = classify(err)
			d.judge(g, err)
			put(item[T]{err: err})
			return
		}
		defer end()
		for first := true; ; first = false {
			value, err := receive()
			if errors.Is(err, io.EOF) {
				d.judge(g, nil)
				put(item[T]{err: io.EOF})
				return
			}
			err = classify(err)
			if first || err != nil {
				d.judge(g, err)
			}
			if !put(item[T]{value: value, err: err}) || err != nil {
				return
			}
		}
	}, func(err error) {
		if err != nil {
			put(item[T]{err: &driver.Error{Kind: driver.Unknown, Err: err}})
		}
		close(s.items)
	})
	if err != nil {
		cancel()
		switch {
		case errors.Is(err, supervisor.ErrClosed):
			return nil, driver.ErrClosed
		case ctx.Err() != nil:
			return nil, &driver.Error{Kind: driver.Ended, Unsent: true, Err: because(ctx, err)}
		}
		return nil, &driver.Error{Kind: driver.Unavailable, Unsent: true, Err: err}
	}
	return s, nil
}

// Next returns what comes next.
func (s *stream[T]) Next(ctx context.Context) (T, error) {
	var none T
	if s.ended != nil {
		return none, s.ended
	}
	select {
	case i, open := <-s.items:
		switch {
		case !open && ctx.Err() != nil:
			s.ended = &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
		case !open:
			s.ended = driver.ErrClosed
		default:
			s.ended = i.err
			return i.value, i.err
		}
	case <-ctx.Done():
		s.ended = &driver.Error{Kind: driver.Ended, Err: context.Cause(ctx)}
	}
	return none, s.ended
}

// Close gives the stream up.
func (s *stream[T]) Close() { s.cancel() }

func direction(backward bool) esdb.Direction {
	if backward {
		return esdb.Backwards
	}
	return esdb.Forwards
}

func streamPosition(from driver.StreamFrom) esdb.StreamPosition {
	switch {
	case from.Start:
		return esdb.Start{}
	case from.End:
		return esdb.End{}
	}
	return esdb.Revision(from.Revision)
}

func allPosition(from driver.AllFrom) esdb.AllPosition {
	switch {
	case from.Start:
		return esdb.Start{}
	case from.End:
		return esdb.End{}
	}
	return esdb.Position{Commit: from.Position.Commit, Prepare: from.Position.Prepare}
}

// recorded takes the event itself: links are not resolved, so a link is an
// event of type $>.
func recorded(e *esdb.ResolvedEvent) *driver.Recorded {
	r := e.OriginalEvent()
	if r == nil {
		return &driver.Recorded{Type: "$>"}
	}
	return &driver.Recorded{
		ID: r.EventID, Stream: r.StreamID, Revision: r.EventNumber, Position: driver.Position{Commit: r.Position.Commit, Prepare: r.Position.Prepare},
		Type: r.EventType, JSON: r.ContentType == "application/json", Data: r.Data, Metadata: r.UserMetadata,
	}
}
