package projection

// rowCache remembers decoded rows between batches. It has two generations:
// when the young one is full the old one is dropped and the young one takes
// its place, so rows in use survive without a list to maintain.
type rowCache[R any] struct {
	most       int // bytes of both generations, about
	bytes      int // of the young one
	young, old map[string]*cachedRow[R]
	// complete: every row there is, is remembered, so what is not is absent.
	complete bool
}

// cachedRow is what the state holds under a key, plus what apply is about to
// write.
type cachedRow[R any] struct {
	key     string
	row     *R // nil: no such row
	size    int
	changed bool
	by      int    // index of the item that changed it last
	encoded []byte // what to write; nil deletes
	// entries are those that are stored, next those to be; noEntries is why they
	// cannot be found.
	entries, next []indexEntry
	noEntries     error
}

// rowOverhead is what a remembered row costs beside its key and content.
const rowOverhead = 128

// entryOverhead is what a remembered entry of an index costs beside its key.
const entryOverhead = 32

func newRowCache[R any](most int) *rowCache[R] {
	return &rowCache[R]{most: most, young: map[string]*cachedRow[R]{}, old: map[string]*cachedRow[R]{}}
}

func (c *rowCache[R]) get(key string) *cachedRow[R] {
	if r, ok := c.young[key]; ok {
		return r
	}
	r, ok := c.old[key]
	if !ok {
		return nil
	}
	c.young[key] = r
	c.bytes += r.size
	return r
}

// add remembers a row that get did not find.
func (c *rowCache[R]) add(key string) *cachedRow[R] {
	r := &cachedRow[R]{key: key, size: len(key) + rowOverhead}
	c.young[key] = r
	c.bytes += r.size
	return r
}

// resize notes how large the row's stored form is.
func (c *rowCache[R]) resize(r *cachedRow[R], encoded int) {
	size := len(r.key) + rowOverhead + encoded
	for i := range r.entries {
		size += len(r.entries[i].key) + entryOverhead
	}
	c.bytes += size - r.size
	r.size = size
}

// age keeps the cache within bounds; rows got from it before may be dropped.
func (c *rowCache[R]) age() {
	if c.bytes <= c.most/2 {
		return
	}
	if len(c.old) > 0 {
		c.complete = false
	}
	c.old, c.young, c.bytes = c.young, make(map[string]*cachedRow[R], len(c.young)), 0
}

func (c *rowCache[R]) forget() {
	c.young, c.old, c.bytes, c.complete = map[string]*cachedRow[R]{}, map[string]*cachedRow[R]{}, 0, false
}

func (c *rowCache[R]) startEmpty() {
	c.forget()
	c.complete = true
}
