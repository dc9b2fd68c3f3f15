package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/deed-go/deed/eventstore"
)

// eventsCommand reads events.
type eventsCommand struct {
	storeFlag
	Stream   string   `placeholder:"NAME" help:"Only events of this stream, by its whole name, for example account-ann."`
	Category string   `help:"Only events of streams of this category."`
	Type     []string `sep:"none" help:"Only events of this type; repeat it for several."`
	Tag      []string `sep:"none" help:"Only events with this tag; repeat it for those that have all."`
	After    place    `default:"0" placeholder:"POSITION" help:"Only events after this position; \"head\" is the end of the log, for --follow."`
	Through  uint64   `placeholder:"POSITION" help:"Only events up to this position."`
	Backward bool     `help:"The last event first."`
	Limit    int      `default:"0" help:"The most events to print; 0 is all."`
	Follow   bool     `short:"f" help:"Then wait for new events, until interrupted."`
	JSON     bool     `help:"Print one JSON object a line."`
}

// Help is shown by deed events --help.
func (c *eventsCommand) Help() string {
	return `An event is printed if everything that was asked for holds. Long data is cut off, but not with --json; there, data that is no JSON is base64, and data_encoding says so.

Following shows what other processes append, so it needs a store that several processes can have open.`
}

// place is a position, or the end of the log.
type place struct {
	position eventstore.Position
	head     bool
}

// UnmarshalText parses a number or "head".
func (p *place) UnmarshalText(text []byte) error {
	if string(text) == "head" {
		p.head = true
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	p.position = eventstore.Position(n)
	if err != nil {
		return fmt.Errorf("%q is no position: use a number, or head", text)
	}
	return nil
}

// Validate refuses filters that select nothing, and what does not go together.
func (c *eventsCommand) Validate() error {
	mistakes := []error{validateLimit(c.Limit)}
	if _, err := c.query(); err != nil {
		mistakes = append(mistakes, err)
	}
	if c.Follow && (c.Backward || c.Through > 0) {
		mistakes = append(mistakes, errors.New("--follow goes forward without an end: leave out --backward and --through"))
	}
	return errors.Join(mistakes...)
}

func (c *eventsCommand) query() (eventstore.Query, error) {
	item := eventstore.Item{Category: c.Category, Types: c.Type, Tags: c.Tag}
	if c.Stream != "" {
		stream, err := eventstore.ParseStream(c.Stream)
		if err != nil {
			return eventstore.Query{}, fmt.Errorf("--stream: %w", err)
		}
		item.Stream = stream
	}
	if c.Stream == "" && c.Category == "" && len(c.Type) == 0 && len(c.Tag) == 0 {
		return eventstore.All(), nil
	}
	q := eventstore.Match(item)
	return q, q.Validate()
}

// Run prints the events.
func (c *eventsCommand) Run(ctx context.Context, e *Environment) (err error) {
	q, err := c.query()
	if err != nil {
		return err
	}
	_, store, release, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer release(&err)
	after := c.After.position
	if c.After.head {
		if after, err = store.Head(ctx); err != nil {
			return err
		}
	}
	out := bufio.NewWriterSize(e.Stdout, 64<<10)
	defer func() { err = errors.Join(err, out.Flush()) }()
	var printer eventPrinter = &linePrinter{out: out}
	if c.JSON {
		printer = newJSONPrinter(out)
	}
	if c.Follow {
		return c.follow(ctx, store, q, after, printer, out)
	}
	options := eventstore.ReadOptions{After: after, Through: eventstore.Position(c.Through), Backward: c.Backward, Limit: c.Limit}
	for r, err := range store.Read(ctx, q, options) {
		if err != nil {
			return err
		}
		if err := printer.print(&r); err != nil {
			return err
		}
	}
	return nil
}

// follow prints events until ctx ends, which is no failure.
func (c *eventsCommand) follow(ctx context.Context, store eventstore.Store, q eventstore.Query, after eventstore.Position, printer eventPrinter, out *bufio.Writer) error {
	n := 0
	for batch, err := range store.Subscribe(ctx, q, after) {
		if err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // it was told to end
			}
			return err
		}
		for i := range batch.Events {
			if err := printer.print(&batch.Events[i]); err != nil {
				return err
			}
			if n++; n == c.Limit {
				return nil
			}
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
	return nil
}

type eventPrinter interface {
	print(r *eventstore.Recorded) error
}

// jsonEvent is an event as --json prints it.
type jsonEvent struct {
	Position eventstore.Position `json:"position"`
	Stream   string              `json:"stream"`
	Version  uint64              `json:"version"`
	Type     string              `json:"type"`
	ID       uuid.UUID           `json:"id"`
	Time     time.Time           `json:"time"`
	Tags     []string            `json:"tags,omitempty"`
	Metadata eventstore.Metadata `json:"metadata,omitzero"`
	// Data is the event's own JSON; with an encoding it is a string.
	Data         json.RawMessage `json:"data,omitempty"`
	DataEncoding string          `json:"data_encoding,omitempty"`
}

type jsonPrinter struct{ encoder *json.Encoder }

func newJSONPrinter(out io.Writer) jsonPrinter {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return jsonPrinter{encoder}
}

func (p jsonPrinter) print(r *eventstore.Recorded) error { return p.encoder.Encode(newJSONEvent(r)) }

func newJSONEvent(r *eventstore.Recorded) jsonEvent {
	line := jsonEvent{
		Position: r.Position, Stream: r.Stream.String(), Version: r.Version, Type: r.Type, ID: r.ID, Time: r.Time,
		Tags: r.Tags, Metadata: r.Metadata,
	}
	switch {
	case len(r.Data) == 0:
	case isJSON(r.Data):
		line.Data = r.Data
	default:
		line.Data = fmt.Appendf(nil, "%q", base64.StdEncoding.EncodeToString(r.Data))
		line.DataEncoding = "base64"
	}
	return line
}

func isJSON(data []byte) bool { return utf8.Valid(data) && json.Valid(data) }

// linePrinter prints an event a line, in columns that widen as they must.
type linePrinter struct {
	out    io.Writer
	widths [4]int
}

// longData is where data is cut off.
const longData = 160

func (p *linePrinter) print(r *eventstore.Recorded) error {
	cells := [4]string{strconv.FormatUint(uint64(r.Position), 10), moment(r.Time), fmt.Sprintf("%s@%d", r.Stream, r.Version), r.Type}
	var line strings.Builder
	for i, cell := range cells {
		width := utf8.RuneCountInString(cell)
		p.widths[i] = max(p.widths[i], width)
		padding := strings.Repeat(" ", p.widths[i]-width)
		if i == 0 {
			line.WriteString(padding + cell + "  ")
		} else {
			line.WriteString(cell + padding + "  ")
		}
	}
	if len(r.Tags) > 0 {
		fmt.Fprintf(&line, "[%s]  ", strings.Join(r.Tags, " "))
	}
	line.WriteString(readable(r.Data))
	_, err := fmt.Fprintln(p.out, strings.TrimRight(line.String(), " "))
	return err
}

// readable writes data on one line, without what a terminal would obey.
func readable(data []byte) string {
	text := ""
	switch compact := (bytes.Buffer{}); {
	case len(data) == 0:
		return ""
	case isJSON(data) && json.Compact(&compact, data) == nil:
		text = compact.String()
	case utf8.Valid(data):
		text = strconv.Quote(string(data))
	default:
		text = "base64:" + base64.StdEncoding.EncodeToString(data)
	}
	if utf8.RuneCountInString(text) > longData {
		text = string([]rune(text)[:longData]) + "…"
	}
	// C1 controls and bidirectional marks may be in JSON's strings as they are.
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, text)
}
