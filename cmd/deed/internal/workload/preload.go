package workload

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deed-go/deed/eventstore"
)

// Events that are stored beforehand come in blocks: a number of streams of one
// length, written interleaved, a few events of each in turn. A complete block is
// noted in a stream of its own, so that later runs find it.
var blocks = eventstore.Stream{Category: "bench_preload", ID: "blocks"}

const blockType = "bench.block"

// block is what is noted about one.
type block struct {
	ID      string `json:"block"`
	Streams int    `json:"streams"`
	Length  int    `json:"length"` // events of each stream
	Payload int    `json:"payload"`
	Tags    int    `json:"tags,omitempty"`
}

func (k block) stream(i int) eventstore.Stream {
	return eventstore.Stream{Category: blocks.Category, ID: fmt.Sprintf("%s-%d", k.ID, i)}
}

func (k block) events() int { return k.Streams * k.Length }

const (
	streamLength = 100  // of the streams that are stored beforehand, unless asked for otherwise
	blockStreams = 1000 // the most that are interleaved
	inTurn       = 10   // events of one stream that follow one another, unless asked for otherwise
	inFlight     = 4    // commits
	commitEvents = 1000
	commitBytes  = 4 << 20
)

// readBlocks returns the blocks in the store.
func (b *bench) readBlocks(ctx context.Context) ([]block, error) {
	var all []block
	for e, err := range b.store.Read(ctx, eventstore.OneStream(blocks), eventstore.ReadOptions{}) {
		if err != nil {
			return nil, fmt.Errorf("look for events stored beforehand: %w", err)
		}
		if e.Type != blockType {
			continue
		}
		var k block
		if err := json.Unmarshal(e.Data, &k); err != nil {
			return nil, fmt.Errorf("event %d, about events stored beforehand: %w", e.Position, err)
		}
		all = append(all, k)
	}
	return all, nil
}

// preload stores events until the log has the number that was asked for.
func (b *bench) preload(ctx context.Context, tags Tagging) error {
	return b.fillUpTo(ctx, b.timing.Preload, tags)
}

// fillUpTo stores events until the log is as long.
func (b *bench) fillUpTo(ctx context.Context, length int, tags Tagging) error {
	if length == 0 {
		return nil
	}
	if b.Gaps {
		return b.storedEvents(ctx, length)
	}
	head, err := b.store.Head(ctx)
	if err != nil {
		return err
	}
	if missing := length - int(head); missing > 0 {
		return b.fill(ctx, (missing+streamLength-1)/streamLength, streamLength, tags)
	}
	return nil
}

// fill stores so many streams of one length, in blocks.
func (b *bench) fill(ctx context.Context, streams, length int, tags Tagging) error {
	progress := &filling{bench: b, total: int64(streams) * int64(length)}
	for streams > 0 {
		k := block{ID: newID(), Streams: min(streams, blockStreams), Length: length, Payload: b.timing.Payload, Tags: tags.Count}
		if err := b.fillBlock(ctx, k, tags, progress); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted after %d of %d events were stored beforehand; they stay: %w", progress.done.Load(), progress.total, context.Cause(ctx))
			}
			return fmt.Errorf("store events beforehand: %w", err)
		}
		streams -= k.Streams
	}
	return nil
}

// filling is how far it has come.
type filling struct {
	*bench
	total int64
	done  atomic.Int64
	mu    sync.Mutex
	told  time.Time
}

func (f *filling) add(n int) {
	done := f.done.Add(int64(n))
	if f.Progress == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); done == f.total || now.Sub(f.told) >= reportEvery {
		f.told = now
		f.Progress(Progress{Phase: "storing events", Done: done, Total: f.total})
	}
}

// fillBlock writes a block with several commits in flight. Events have no
// conditions: nobody else writes to these streams.
func (b *bench) fillBlock(ctx context.Context, k block, tags Tagging, progress *filling) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	commits := make(chan []eventstore.Event)
	var group sync.WaitGroup
	for range inFlight {
		group.Go(func() {
			for events := range commits {
				if err := b.write(ctx, events); err != nil {
					cancel(err)
					return
				}
				progress.add(len(events))
			}
		})
	}
	b.deal(ctx, k, tags, commits)
	close(commits)
	group.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	note, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return b.write(ctx, []eventstore.Event{{Stream: blocks, Type: blockType, Data: note, Metadata: metadata}})
}

// write appends, in a commit for each stream where the store cannot do more. What
// cannot be known is asked for again under the same key.
func (b *bench) write(ctx context.Context, events []eventstore.Event) error {
	c := eventstore.Commit{Events: events, Key: "bench_" + newID()}
	for {
		_, err := b.store.Append(ctx, c)
		switch {
		case errors.Is(err, errors.ErrUnsupported) && events[0].Stream != events[len(events)-1].Stream:
			for len(events) > 0 {
				n := slices.IndexFunc(events, func(e eventstore.Event) bool { return e.Stream != events[0].Stream })
				if n < 0 {
					n = len(events)
				}
				if err := b.write(ctx, events[:n]); err != nil {
					return err
				}
				events = events[n:]
			}
			return nil
		case !errors.Is(err, eventstore.ErrOutcomeUnknown) || ctx.Err() != nil:
			return err
		}
	}
}

// deal makes the events of a block, a few of each stream in turn, and hands
// them over in commits.
func (b *bench) deal(ctx context.Context, k block, tags Tagging, to chan<- []eventstore.Event) {
	data, random := newData(k.Payload), newRandom()
	most := min(commitEvents, max(1, commitBytes/k.Payload))
	var events []eventstore.Event
	flush := func() bool {
		if len(events) == 0 {
			return true
		}
		select {
		case to <- events:
			events = nil
			return true
		case <-ctx.Done():
			return false
		}
	}
	turn := cmp.Or(b.timing.InTurn, inTurn)
	for from := 0; from < k.Length; from += turn {
		for i := range k.Streams {
			of := k.stream(i)
			for range min(turn, k.Length-from) {
				events = append(events, eventstore.Event{Stream: of, Type: notedType, Tags: tags.draw(random), Data: data, Metadata: metadata})
				if len(events) == most && !flush() {
					return
				}
			}
		}
	}
	flush()
}

// storedStreams returns the streams of a length that are stored, and stores
// some if there are fewer than at least.
func (b *bench) storedStreams(ctx context.Context, length, least int) ([]eventstore.Stream, error) {
	find := func() ([]eventstore.Stream, error) {
		known, err := b.readBlocks(ctx)
		var streams []eventstore.Stream
		for _, k := range known {
			if k.Length == length {
				for i := range k.Streams {
					streams = append(streams, k.stream(i))
				}
			}
		}
		return streams, err
	}
	streams, err := find()
	if missing := least - len(streams); err == nil && missing > 0 {
		if err := b.fill(ctx, missing, length, Tagging{}); err != nil {
			return nil, err
		}
		return find()
	}
	return streams, err
}

// storedEvents makes sure that so many of the events that runs write are stored.
func (b *bench) storedEvents(ctx context.Context, least int) error {
	known, err := b.readBlocks(ctx)
	if err != nil {
		return err
	}
	for _, k := range known {
		least -= k.events()
	}
	if least <= 0 {
		return nil
	}
	return b.fill(ctx, (least+streamLength-1)/streamLength, streamLength, Tagging{})
}

// spread picks n of all, evenly.
func spread[T any](all []T, n int) []T {
	if n >= len(all) {
		return all
	}
	picked := make([]T, n)
	for i := range picked {
		picked[i] = all[i*len(all)/n]
	}
	return slices.Clip(picked)
}

// defaultTo replaces 0.
func defaultTo(n, otherwise int) int { return cmp.Or(n, otherwise) }
