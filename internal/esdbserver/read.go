package esdbserver

import (
	"bytes"
	"context"
	"math"
	"regexp"
	"strconv"
	"strings"

	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// pageRecords is how many records are looked at before the lock is given back.
const pageRecords = 256

// reading is one Read call.
type reading struct {
	node    *node
	log     *log
	call    streams.Streams_ReadServer
	ctx     context.Context
	resolve bool
	textIDs bool
	filter  *filter
}

// Read reads or follows a stream or $all.
func (s *streamsService) Read(request *streams.ReadReq, call streams.Streams_ReadServer) error {
	if wants := grpcmetadata.ValueFromIncomingContext(call.Context(), "requires-leader"); len(wants) > 0 && strings.EqualFold(wants[0], "true") {
		if err := s.leads(call.Context()); err != nil {
			return err
		}
	}
	o := request.GetOptions()
	r := &reading{node: s.node, log: s.node.log, call: call, ctx: call.Context(), resolve: o.GetResolveLinks()}
	_, r.textIDs = o.GetUuidOption().GetContent().(*streams.ReadReq_Options_UUIDOption_String_)
	if f := o.GetFilter(); f != nil {
		if o.GetAll() == nil {
			return invalid("A filter is for $all only")
		}
		var err error
		if r.filter, err = newFilter(f); err != nil {
			return err
		}
	}
	backward := o.GetReadDirection() == streams.ReadReq_Options_Backwards
	_, subscribes := o.GetCountOption().(*streams.ReadReq_Options_Subscription)
	if !subscribes {
		if _, counts := o.GetCountOption().(*streams.ReadReq_Options_Count); !counts {
			return invalid("The read says neither a count nor that it is a subscription")
		}
	}
	count := o.GetCount()
	switch {
	case o.GetStream() != nil:
		name, err := streamName(o.GetStream().GetStreamIdentifier())
		if err != nil {
			return err
		}
		switch {
		case subscribes && backward:
			return invalid("A subscription does not go backwards")
		case subscribes:
			return r.followStream(name, o.GetStream())
		case backward:
			return r.streamBackward(name, o.GetStream(), count)
		default:
			return r.streamForward(name, o.GetStream(), count)
		}
	case o.GetAll() != nil:
		position, err := r.position(o.GetAll())
		switch {
		case err != nil:
			return err
		case subscribes && backward:
			return invalid("A subscription does not go backwards")
		case subscribes:
			if r.filter != nil && r.filter.interval == 0 {
				return invalid("The checkpoint interval 0 is invalid: use at least 1")
			}
			return r.followAll(position, o.GetAll())
		case backward:
			return r.allBackward(position, count)
		default:
			return r.allForward(position, count)
		}
	}
	return invalid("The read names neither a stream nor $all")
}

// revision returns where a read of a stream begins: math.MaxInt64 is the end.
func revision(o *streams.ReadReq_Options_StreamOptions) int64 {
	switch v := o.GetRevisionOption().(type) {
	case *streams.ReadReq_Options_StreamOptions_Revision:
		return int64(min(v.Revision, math.MaxInt64))
	case *streams.ReadReq_Options_StreamOptions_End:
		return math.MaxInt64
	}
	return 0
}

// position returns where a read of $all begins: math.MaxUint64 is the end.
func (r *reading) position(o *streams.ReadReq_Options_AllOptions) (uint64, error) {
	switch v := o.GetAllOption().(type) {
	case *streams.ReadReq_Options_AllOptions_Position:
		commit, prepare := v.Position.GetCommitPosition(), v.Position.GetPreparePosition()
		if commit == math.MaxUint64 && prepare == math.MaxUint64 {
			return math.MaxUint64, nil
		}
		if commit < prepare || commit > math.MaxInt64 {
			return 0, invalid("The position C:%d/P:%d is invalid", commit, prepare)
		}
		r.log.mu.RLock()
		valid := commit == prepare && r.log.isPosition(commit)
		r.log.mu.RUnlock()
		if !valid {
			return 0, errPosition
		}
		return commit, nil
	case *streams.ReadReq_Options_AllOptions_End:
		return math.MaxUint64, nil
	}
	return 0, nil
}

// open reports whether the stream can be read; where it cannot it was answered.
func (r *reading) open(name string) (ok bool, err error) {
	r.log.mu.RLock()
	last, soft := r.log.last(name), r.log.isSoftDeleted(name)
	r.log.mu.RUnlock()
	switch {
	case last == deletedRevision:
		return false, refuseDeleted(r.ctx, name)
	case last == noRevision || soft:
		return false, r.call.Send(&streams.ReadResp{Content: &streams.ReadResp_StreamNotFound_{StreamNotFound: &streams.ReadResp_StreamNotFound{
			StreamIdentifier: &shared.StreamIdentifier{StreamName: []byte(name)},
		}}})
	}
	return true, nil
}

func (r *reading) streamForward(name string, o *streams.ReadReq_Options_StreamOptions, count uint64) error {
	if ok, err := r.open(name); !ok {
		return err
	}
	next := revision(o)
	r.log.mu.RLock()
	end := int64(len(r.log.stream(name).records)) // a read ends where the stream ended
	r.log.mu.RUnlock()
	for next < end && count > 0 {
		var page []*streams.ReadResp
		r.log.mu.RLock()
		from, since := r.log.visible(name)
		all := r.log.stream(name).records
		next = max(next, from)
		for range pageRecords {
			if next >= end || count == 0 {
				break
			}
			if e := all[next]; e.created >= since {
				page = append(page, r.event(e))
				count--
			}
			next++
		}
		r.log.mu.RUnlock()
		if err := r.send(page); err != nil {
			return err
		}
	}
	return nil
}

func (r *reading) streamBackward(name string, o *streams.ReadReq_Options_StreamOptions, count uint64) error {
	if ok, err := r.open(name); !ok {
		return err
	}
	next := revision(o)
	r.log.mu.RLock()
	next = min(next, int64(len(r.log.stream(name).records))-1)
	r.log.mu.RUnlock()
	for next >= 0 && count > 0 {
		var page []*streams.ReadResp
		r.log.mu.RLock()
		from, since := r.log.visible(name)
		all := r.log.stream(name).records
		for range pageRecords {
			if next < from || count == 0 {
				break
			}
			if e := all[next]; e.created >= since {
				page = append(page, r.event(e))
				count--
			}
			next--
		}
		r.log.mu.RUnlock()
		if err := r.send(page); err != nil {
			return err
		}
		if next < from {
			break
		}
	}
	return nil
}

func (r *reading) allForward(position, count uint64) error {
	r.log.mu.RLock()
	next, end := r.log.find(position), len(r.log.records)
	r.log.mu.RUnlock()
	for next < end && count > 0 {
		var page []*streams.ReadResp
		r.log.mu.RLock()
		for range pageRecords {
			if next >= end || count == 0 {
				break
			}
			if e := r.log.records[next]; r.filter.matches(e) {
				page = append(page, r.event(e))
				count--
			}
			next++
		}
		r.log.mu.RUnlock()
		if err := r.send(page); err != nil {
			return err
		}
	}
	return nil
}

func (r *reading) allBackward(position, count uint64) error {
	r.log.mu.RLock()
	next := r.log.find(position) - 1
	r.log.mu.RUnlock()
	for next >= 0 && count > 0 {
		var page []*streams.ReadResp
		r.log.mu.RLock()
		for range pageRecords {
			if next < 0 || count == 0 {
				break
			}
			if e := r.log.records[next]; r.filter.matches(e) {
				page = append(page, r.event(e))
				count--
			}
			next--
		}
		r.log.mu.RUnlock()
		if err := r.send(page); err != nil {
			return err
		}
	}
	return nil
}

func (r *reading) send(page []*streams.ReadResp) error {
	for _, m := range page {
		if err := r.call.Send(m); err != nil {
			return err
		}
	}
	return r.ctx.Err()
}

// event is the message for a record; links are followed if that was asked for.
// The lock is held.
func (r *reading) event(e *record) *streams.ReadResp {
	m := &streams.ReadResp_ReadEvent{Position: &streams.ReadResp_ReadEvent_CommitPosition{CommitPosition: e.position}}
	if r.resolve && e.eventType == typeLink {
		m.Link = e.recorded(r.textIDs)
		if target := r.log.target(e); target != nil {
			m.Event = target.recorded(r.textIDs)
		}
	} else {
		m.Event = e.recorded(r.textIDs)
	}
	return &streams.ReadResp{Content: &streams.ReadResp_Event{Event: m}}
}

// target returns what a link points to, nil when it cannot be read.
func (l *log) target(link *record) *record {
	number, name, found := bytes.Cut(link.data, []byte("@"))
	if !found {
		return nil
	}
	revision, err := strconv.ParseInt(string(number), 10, 64)
	if err != nil || revision < 0 || l.last(string(name)) == deletedRevision {
		return nil
	}
	from, since := l.visible(string(name))
	all := l.stream(string(name)).records
	if revision < from || revision >= int64(len(all)) || all[revision].created < since {
		return nil
	}
	return all[revision]
}

// filter selects records of $all.
type filter struct {
	byType   bool
	regex    *regexp.Regexp
	prefixes []string
	// interval is after how many records a checkpoint is due.
	interval int
}

// defaultWindow is the search window when none is given.
const defaultWindow = 32

func newFilter(o *streams.ReadReq_Options_FilterOptions) (*filter, error) {
	f := &filter{}
	var expression *streams.ReadReq_Options_FilterOptions_Expression
	switch v := o.GetFilter().(type) {
	case *streams.ReadReq_Options_FilterOptions_EventType:
		f.byType, expression = true, v.EventType
	case *streams.ReadReq_Options_FilterOptions_StreamIdentifier:
		expression = v.StreamIdentifier
	default:
		return nil, invalid("The filter is neither for event types nor for streams")
	}
	switch {
	case expression.GetRegex() != "":
		var err error
		if f.regex, err = regexp.Compile(expression.GetRegex()); err != nil {
			return nil, invalid("The filter's regular expression: %v", err)
		}
	case len(expression.GetPrefix()) > 0:
		f.prefixes = expression.GetPrefix()
	default:
		return nil, invalid("The filter has neither a regular expression nor prefixes")
	}
	window := uint64(defaultWindow)
	if m, ok := o.GetWindow().(*streams.ReadReq_Options_FilterOptions_Max); ok {
		window = uint64(m.Max)
	}
	f.interval = int(min(window*uint64(o.GetCheckpointIntervalMultiplier()), math.MaxInt32))
	return f, nil
}

func (f *filter) matches(r *record) bool {
	if f == nil {
		return true
	}
	text := r.stream
	if f.byType {
		text = r.eventType
	}
	if f.regex != nil {
		return f.regex.MatchString(text)
	}
	for _, p := range f.prefixes {
		if strings.HasPrefix(text, p) {
			return true
		}
	}
	return false
}

func (r *reading) confirm() error {
	return r.call.Send(&streams.ReadResp{Content: &streams.ReadResp_Confirmation{
		Confirmation: &streams.ReadResp_SubscriptionConfirmation{SubscriptionId: uuid.NewString()},
	}})
}

func checkpoint(position uint64) *streams.ReadResp {
	return &streams.ReadResp{Content: &streams.ReadResp_Checkpoint_{
		Checkpoint: &streams.ReadResp_Checkpoint{CommitPosition: position, PreparePosition: position},
	}}
}

// follow sends what next returns until the call ends. When next has nothing new
// the subscription has caught up; the first time it says so.
func (r *reading) follow(next func() (page []*streams.ReadResp, more bool, err error), caughtUp func()) error {
	abort, behind := r.node.server.faults.signals()
	live := false
	for {
		r.log.mu.RLock()
		changed := r.log.changed
		page, more, err := next()
		r.log.mu.RUnlock()
		if sent := r.send(page); sent != nil {
			return sent
		}
		if err != nil {
			return err
		}
		if more {
			select {
			case <-abort:
				return errTooSlow
			default:
			}
			continue
		}
		if !live {
			caughtUp()
			if err := r.call.Send(&streams.ReadResp{Content: &streams.ReadResp_CaughtUp_{CaughtUp: &streams.ReadResp_CaughtUp{}}}); err != nil {
				return err
			}
			live = true
		}
		select {
		case <-changed:
		case <-abort:
			return errTooSlow
		case <-behind:
			_, behind = r.node.server.faults.signals()
			if err := r.call.Send(&streams.ReadResp{Content: &streams.ReadResp_FellBehind_{FellBehind: &streams.ReadResp_FellBehind{}}}); err != nil {
				return err
			}
			live = false
		case <-r.node.ctx.Done():
			return status.Error(codes.Unavailable, "Server is shutting down")
		case <-r.ctx.Done():
			return status.FromContextError(r.ctx.Err()).Err()
		}
	}
}

var errTooSlow = status.Error(codes.Aborted, "Operation timed out: Consumer too slow to handle event while live. Client resubscription required.")

func (r *reading) followStream(name string, o *streams.ReadReq_Options_StreamOptions) error {
	r.log.mu.RLock()
	deleted := r.log.last(name) == deletedRevision
	next := int64(0)
	switch v := o.GetRevisionOption().(type) {
	case *streams.ReadReq_Options_StreamOptions_Revision:
		next = int64(min(v.Revision, math.MaxInt64-1)) + 1
	case *streams.ReadReq_Options_StreamOptions_End:
		next = int64(len(r.log.stream(name).records))
	}
	history := int64(len(r.log.stream(name).records))
	r.log.mu.RUnlock()
	if deleted {
		return refuseDeleted(r.ctx, name)
	}
	if err := r.confirm(); err != nil {
		return err
	}
	return r.follow(func() (page []*streams.ReadResp, more bool, err error) {
		all := r.log.stream(name).records
		from, since := r.log.visible(name)
		for range pageRecords {
			if next >= int64(len(all)) {
				if r.log.last(name) == deletedRevision {
					return page, false, refuseDeleted(r.ctx, name)
				}
				return page, false, nil
			}
			// What is truncated is left out of history; what happens later is told
			// whatever becomes of it.
			if e := all[next]; next >= history || next >= from && e.created >= since {
				page = append(page, r.event(e))
			}
			next++
		}
		return page, true, nil
	}, func() {})
}

func (r *reading) followAll(position uint64, o *streams.ReadReq_Options_AllOptions) error {
	r.log.mu.RLock()
	next := 0
	switch {
	case position == math.MaxUint64:
		next = len(r.log.records)
	case o.GetStart() == nil:
		next = r.log.find(position)
		if next < len(r.log.records) && r.log.records[next].position == position {
			next++
		}
	}
	r.log.mu.RUnlock()
	if err := r.confirm(); err != nil {
		return err
	}
	// A checkpoint is due after so many records, matching or not. While it catches
	// up the real server looks at pages of records and tells of a checkpoint only
	// where another page follows, so none comes at the end of history.
	considered, last, live := 0, uint64(0), false
	return r.follow(func() (page []*streams.ReadResp, more bool, err error) {
		for range pageRecords {
			if next >= len(r.log.records) {
				return page, false, nil
			}
			e := r.log.records[next]
			next++
			if position != math.MaxUint64 && e.position <= position {
				continue // the position lay beyond the end when the subscription began
			}
			if r.filter != nil && !live && considered >= r.filter.interval {
				page = append(page, checkpoint(last))
				considered = 0
			}
			if r.filter.matches(e) {
				page = append(page, r.event(e))
			}
			considered++
			last = e.position
			if r.filter != nil && live && considered >= r.filter.interval {
				page = append(page, checkpoint(last))
				considered = 0
			}
		}
		return page, true, nil
	}, func() { live = true })
}
