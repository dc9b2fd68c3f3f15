package saga

// Ahead bounds the rows in memory that wait for a time to come.
func (o Options) Ahead(rows int) Options {
	o.ahead = rows
	return o
}

// Cached counts the histories of the saga's runs that are kept in memory.
func (e *Engine) Cached(saga string) (histories, bytes int) {
	r := e.sagas[saga].current()
	if r == nil {
		return 0, 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.behaviour.(*sagaWorker) //nolint:forcetypeassert,errcheck // a saga's
	return w.cached, w.holding
}

// InMemory counts the runs of the saga that are in memory here.
func (e *Engine) InMemory(saga string) int {
	r := e.sagas[saga].current()
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.behaviour.(*sagaWorker).rows) //nolint:forcetypeassert,errcheck // a saga's
}
