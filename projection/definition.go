package projection

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/internal/logreader"
)

// Projection is a read model: a [ViewDefinition] or an [SQLDefinition].
type Projection interface {
	// Name is unique within an application; it names the stored rows and checkpoint.
	Name() string
	// Err returns the mistakes made in the definition, joined; nil if there are none.
	Err() error

	// origin is what it says about its versions.
	origin() origin
	// partitions is the number of parts that are run by themselves; 0 is one.
	partitions() int
	// inline says that appends apply it, and handles what must be the same in all
	// processes that do.
	inline() bool
	handles() string
	// selection returns the query of what the projection handles; all events that
	// concern the partition are among them.
	selection(enc *eventstore.Encoding, p partition) eventstore.Query
	// open returns what folds events, for one run of the partition.
	open(state State, o *Options, p partition) folder
}

// item is an event on its way through a folder.
type item struct {
	event *eventstore.Recorded
	// value and keys are what decode made of the event, for the folder alone.
	value any
	keys  []string
	// problem is why decode failed.
	problem error
	// memo is what is shared of the event with other projections, until it was
	// decoded; elsewhere: another one is about to, so decode is to be called again.
	memo      *logreader.Memo
	elsewhere bool
	// used: a handler has been given the value, not a copy that has nothing in
	// common with it, so that it may not be as decoded any more.
	used bool
	// parked: the event goes to the dead letters and must not be folded.
	parked bool
	// foreign: the event does not concern the partition.
	foreign bool
}

// folder applies events to the rows of one projection. All but decode is
// called by one goroutine at a time.
type folder interface {
	// decode fills in what the event is to the folder. It may be called while the
	// others run.
	decode(it *item)
	// setup prepares the tables; it is called at every start.
	setup(ctx context.Context, tx StateTx) error
	// prepare does what takes several updates, after that of setup and before the
	// first items come.
	prepare(ctx context.Context, lease Lease) error
	// apply folds the first n of the items, n > 0 unless items is empty, and
	// commits them in one update, fenced by the lease before it reads or writes
	// anything, together with what seal(tx, n) writes, which fences too. A
	// *handlerError says that nothing was committed because of that item.
	apply(ctx context.Context, lease Lease, items []item, seal func(tx StateTx, n int) error) (n int, err error)
	// applyIn folds all items within the transaction, and leaves its fence and its
	// checkpoint to the caller. After an error nothing is known of rows any more:
	// forget must be called. It needs no state.
	applyIn(ctx context.Context, tx StateTx, items []item) error
	// reads says which rows applyIn would read for the items.
	reads(items []item) (table string, keys []string)
	// holds returns the keys that a decoded item holds back once it is set aside;
	// none is its stream.
	holds(it *item) []string
	// forget drops whatever is remembered of rows.
	forget()
	// fresh says that the projection starts with no rows.
	fresh()
	// clear removes all rows.
	clear(ctx context.Context, tx StateTx) error
}

// handlerError says that the projection's own code, or the stored form of an
// event, is to blame, not the state.
type handlerError struct {
	index int
	cause error
}

func (e *handlerError) Error() string { return e.cause.Error() }
func (e *handlerError) Unwrap() error { return e.cause }

// PanicError is what a panic in a handler becomes.
type PanicError struct {
	Value any
	Stack []byte
}

// Error shows the panic's value.
func (e *PanicError) Error() string { return fmt.Sprintf("handler panicked: %v", e.Value) }

// Unwrap returns the panic's value if it was an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

const maxNameBytes = 64

func validateName(name string) error {
	if name == "" {
		return fmt.Errorf("%w: the projection's name is empty", eventstore.ErrInvalid)
	}
	if len(name) > maxNameBytes {
		return fmt.Errorf("%w: the projection's name %q has %d bytes, at most %d are allowed", eventstore.ErrTooLarge, name, len(name), maxNameBytes)
	}
	for i, r := range name {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
		other := r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
		if !letter && (i == 0 || !other) {
			return fmt.Errorf("%w: projection name %q: %q is not allowed at byte %d: use ASCII letters, digits, '.', '_' and '-', beginning with a letter", eventstore.ErrInvalid, name, r, i)
		}
	}
	return nil
}

func mistakes(name string, all []error, more error) error {
	if more != nil {
		all = append(slices.Clip(all), more)
	}
	if len(all) == 0 {
		return nil
	}
	wrapped := make([]error, len(all))
	for i, err := range all {
		wrapped[i] = fmt.Errorf("projection %q: %w", name, err)
	}
	return errors.Join(wrapped...)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
