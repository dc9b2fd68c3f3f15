package nats

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deed-go/deed/eventstore"
)

// guard is what is known to be wrong with the stream. While something is,
// appends and subscriptions fail.
type guard struct {
	mu    sync.Mutex
	wrong error
	lost  bool          // wrong is for ever: events are lost
	bell  chan struct{} // closed while something is wrong
}

// state returns a channel that is closed when something is wrong, and what is.
func (g *guard) state() (<-chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.bell == nil {
		g.bell = make(chan struct{})
	}
	return g.bell, g.wrong
}

// set notes what is wrong now; nil when nothing is. Lost events stay lost.
func (g *guard) set(wrong error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.lost {
		return
	}
	if g.bell == nil {
		g.bell = make(chan struct{})
	}
	switch {
	case wrong != nil && g.wrong == nil:
		close(g.bell)
	case wrong == nil && g.wrong != nil:
		g.bell = make(chan struct{})
	}
	g.wrong, g.lost = wrong, errors.Is(wrong, eventstore.ErrGap)
}

// look asks for the stream again and again: its settings can be changed, and
// events be removed, at any time.
func (s *Store) look() {
	missing := 0
	for pause(s.base, s.settings.lookEvery) {
		info, err := s.ask(s.base)
		switch {
		case err == nil:
			missing = 0
			s.judgeStream(info)
		case errors.Is(err, jetstream.ErrStreamNotFound):
			// A server that has just begun may not know it yet.
			if missing++; missing > 1 {
				s.guard.set(fmt.Errorf("%w: the stream %q does not exist any more: restore it", eventstore.ErrUnavailable, s.settings.stream))
			}
		}
	}
}

// ask asks for the stream once.
func (s *Store) ask(ctx context.Context) (*jetstream.StreamInfo, error) {
	once, cancel := context.WithTimeout(ctx, s.settings.attempt)
	defer cancel()
	stream, err := s.js.Stream(once, s.settings.stream)
	if err != nil {
		return nil, err
	}
	return stream.CachedInfo(), nil
}

// leads reports whether the leader has everything up to the sequence and has
// just heard from all replicas, so that none of them takes itself for the leader:
// what is asked of the leader from here on is answered by one that has it all.
func (s *Store) leads(ctx context.Context, through uint64) bool {
	if s.replicas.Load() == 1 {
		return true
	}
	info, err := s.ask(ctx)
	if err != nil || info.Cluster == nil || info.Cluster.Leader == "" || len(info.Cluster.Replicas) != info.Config.Replicas-1 || info.State.LastSeq < through {
		return false
	}
	for _, r := range info.Cluster.Replicas {
		if r.Offline || r.Active <= 0 || r.Active > 2*time.Second { // 0: never since it was elected
			return false
		}
	}
	return true
}

// judgeStream takes notice of the stream as it is now.
func (s *Store) judgeStream(info *jetstream.StreamInfo) {
	err := missingEvents(&info.State)
	if err != nil { // for ever: not on one answer
		if info, e := s.ask(s.base); e != nil || missingEvents(&info.State) == nil {
			return
		}
	}
	if err == nil && !info.Created.Equal(s.created) && info.Config.Metadata[metadataLogID] != s.logID {
		err = fmt.Errorf("%w: the stream %q was removed and made anew: it is not the log that was opened: restore that one", eventstore.ErrGap, s.settings.stream)
	}
	if err == nil && info.State.LastSeq < s.known.Load() {
		// A leader of yesterday says so too; verify knows.
		if e := s.verify(s.base); errors.Is(e, eventstore.ErrGap) {
			err = e
		}
	}
	if err == nil {
		if flaw := s.flaw(&info.Config); flaw != nil {
			err = fmt.Errorf("%w: stream %q was changed while it was open: %w", eventstore.ErrUnavailable, s.settings.stream, flaw)
		} else if id := info.Config.Metadata[metadataLogID]; id != s.logID {
			err = fmt.Errorf("%w: stream %q was changed while it was open: its metadata %s is %q, it was %q: put it back", eventstore.ErrUnavailable, s.settings.stream, metadataLogID, id, s.logID)
		}
	}
	if err == nil {
		s.adopt(&info.Config)
	}
	s.guard.set(err)
}

// adopt takes over what may be changed while the log is open.
func (s *Store) adopt(c *jetstream.StreamConfig) {
	s.replicas.Store(int32(c.Replicas))
	payload := s.conn.MaxPayload()
	if most := int64(c.MaxMsgSize); most > 0 && (payload <= 0 || most < payload) {
		payload = most
	}
	s.payload.Store(payload)
}

// missingEvents says what the stream's own figures tell of events that are gone.
func missingEvents(state *jetstream.StreamState) error {
	switch {
	case state.LastSeq > 0 && (state.FirstSeq != 1 || state.Msgs != state.LastSeq), state.NumDeleted > 0:
		return fmt.Errorf("%w: the stream has %d messages from sequence %d to %d: messages were removed", eventstore.ErrGap, state.Msgs, state.FirstSeq, state.LastSeq)
	}
	return nil
}

// lookEvery is how often the stream is looked at.
const lookEvery = 5 * time.Second
