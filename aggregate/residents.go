package aggregate

// residents are the activations in memory: the busy ones, and as many idle ones
// as may be kept, of which the one that has been idle for longest goes first. It
// is guarded by the runtime's lock. An activation stays where it is in the map
// while it goes from busy to idle and back, which each command makes it do; a
// map of the busy ones beside a cache of the idle ones took eight operations
// for that.
type residents struct {
	at   map[address]*resident
	busy int
	idle resident // the ring of idle ones: next is the last that came to rest
	kept int      // idle ones
	most int      // idle ones to keep
}

// resident is an activation's place among the others.
type resident struct {
	active     active
	address    address
	busy       bool
	next, back *resident // of the ring, while idle
}

func newResidents(most int) *residents {
	rs := &residents{at: map[address]*resident{}, most: max(most, 0)}
	rs.idle.next, rs.idle.back = &rs.idle, &rs.idle
	return rs
}

// enter adds a busy one.
func (rs *residents) enter(r *resident) {
	rs.at[r.address] = r
	r.busy = true
	rs.busy++
}

// wake makes an idle one busy.
func (rs *residents) wake(r *resident) {
	rs.unlink(r)
	r.busy = true
	rs.busy++
}

// rest makes a busy one idle, and forgets the one that has been idle for
// longest if there are too many.
func (rs *residents) rest(r *resident) {
	r.busy = false
	rs.busy--
	r.next, r.back = rs.idle.next, &rs.idle
	r.next.back, rs.idle.next = r, r
	rs.kept++
	if rs.kept > rs.most {
		oldest := rs.idle.back
		rs.unlink(oldest)
		delete(rs.at, oldest.address)
	}
}

// leave forgets a busy one.
func (rs *residents) leave(r *resident) {
	r.busy = false
	rs.busy--
	delete(rs.at, r.address)
}

func (rs *residents) unlink(r *resident) {
	r.next.back, r.back.next = r.back, r.next
	r.next, r.back = nil, nil
	rs.kept--
}
