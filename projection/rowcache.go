package projection

// rowCache remembers decoded rows between batches. It has two generations:
// when the young one is full the old one is dropped and the young one takes
// its place, so rows in use survive without a list to maintain.
type rowCache[T any] struct {
	most       int
	young, old map[string]*T
	// complete: every row there is, is remembered, so what is not is absent.
	complete bool
}

func newRowCache[T any](most int) *rowCache[T] {
	return &rowCache[T]{most: most, young: map[string]*T{}, old: map[string]*T{}}
}

func (c *rowCache[T]) get(key string) *T {
	if r, ok := c.young[key]; ok {
		return r
	}
	if r, ok := c.old[key]; ok {
		c.young[key] = r
		return r
	}
	return nil
}

func (c *rowCache[T]) put(key string, row *T) { c.young[key] = row }

// age keeps the cache within bounds; rows got from it before may be dropped.
func (c *rowCache[T]) age() {
	if len(c.young) <= c.most/2 {
		return
	}
	if len(c.old) > 0 {
		c.complete = false
	}
	c.old, c.young = c.young, make(map[string]*T, len(c.young))
}

func (c *rowCache[T]) forget() {
	c.young, c.old, c.complete = map[string]*T{}, map[string]*T{}, false
}

func (c *rowCache[T]) startEmpty() {
	c.forget()
	c.complete = true
}
