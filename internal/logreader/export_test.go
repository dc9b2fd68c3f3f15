package logreader

import "github.com/deed-go/deed/eventstore"

var (
	Covers    = covers
	Union     = union
	NewFilter = newFilter
)

func (f *filter) Selects(e *eventstore.Recorded) bool { return f.selects(e) }

func (f *filter) Pick(events []eventstore.Recorded) ([]eventstore.Recorded, []int) {
	return f.pick(events)
}

// Groups returns how many groups have members.
func Groups(r *Reader) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.groups)
}

// Kept returns how large the windows are, in events and batches.
func Kept(r *Reader) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.groups {
		n += g.events
	}
	return n
}
