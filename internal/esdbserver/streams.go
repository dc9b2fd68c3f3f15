package esdbserver

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strconv"

	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type streamsService struct {
	streams.UnimplementedStreamsServer
	node *node
}

const (
	contentJSON   = "application/json"
	contentBinary = "application/octet-stream"
)

// Append writes events to one stream.
func (s *streamsService) Append(call streams.Streams_AppendServer) error {
	ctx := call.Context()
	first, err := call.Recv()
	if err != nil {
		return err
	}
	options := first.GetOptions()
	if options == nil {
		return invalid("Expected the options of the append first")
	}
	name, err := streamName(options.GetStreamIdentifier())
	if err != nil {
		return err
	}
	var expected int64
	switch e := options.GetExpectedStreamRevision().(type) {
	case *streams.AppendReq_Options_Revision:
		if e.Revision > math.MaxInt64 {
			return invalid("The expected revision %d is out of range", e.Revision)
		}
		expected = int64(e.Revision)
	case *streams.AppendReq_Options_NoStream:
		expected = expectNone
	case *streams.AppendReq_Options_Any:
		expected = expectAny
	case *streams.AppendReq_Options_StreamExists:
		expected = expectExists
	default:
		return invalid("The append says no expected revision")
	}
	var events []*record
	size := 0
	for {
		request, err := call.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		proposed := request.GetProposedMessage()
		if proposed == nil {
			return invalid("Expected an event")
		}
		if size += len(proposed.GetData()); size > s.node.server.maxAppend {
			return refuseTooLarge(ctx, s.node.server.maxAppend)
		}
		event, err := toRecord(ctx, name, proposed)
		if err != nil {
			return err
		}
		events = append(events, event)
	}
	if err := s.leads(ctx); err != nil {
		return err
	}
	if s.node.server.faults.takeCut(BeforeWritten) {
		return s.node.cut(ctx)
	}
	o, err := s.node.do(ctx, func(l *log) outcome { return l.append(name, expected, events) })
	if err != nil {
		return refuseFailed(err)
	}
	switch o.verdict {
	case streamDeleted:
		return refuseDeleted(ctx, name)
	case wrongVersion:
		return call.SendAndClose(wrongVersionAnswer(expected, o.current))
	}
	if s.node.server.faults.takeCut(AfterWritten) {
		return s.node.cut(ctx)
	}
	success := &streams.AppendResp_Success{}
	if o.last == noRevision {
		success.CurrentRevisionOption = &streams.AppendResp_Success_NoStream{NoStream: &shared.Empty{}}
	} else {
		success.CurrentRevisionOption = &streams.AppendResp_Success_CurrentRevision{CurrentRevision: uint64(o.last)}
	}
	if o.position == 0 {
		success.PositionOption = &streams.AppendResp_Success_NoPosition{NoPosition: &shared.Empty{}}
	} else {
		success.PositionOption = &streams.AppendResp_Success_Position{
			Position: &streams.AppendResp_Position{CommitPosition: o.position, PreparePosition: o.position},
		}
	}
	return call.SendAndClose(&streams.AppendResp{Result: &streams.AppendResp_Success_{Success: success}})
}

// leads refuses what is for the leader while another node is it.
func (s *streamsService) leads(ctx context.Context) error {
	if leader := s.node.server.faults.following(); leader != nil {
		return refuseNotLeader(ctx, leader.host, leader.port)
	}
	return nil
}

func wrongVersionAnswer(expected, current int64) *streams.AppendResp {
	w := &streams.AppendResp_WrongExpectedVersion{}
	if current == noRevision {
		w.CurrentRevisionOption = &streams.AppendResp_WrongExpectedVersion_CurrentNoStream{CurrentNoStream: &shared.Empty{}}
		w.CurrentRevisionOption_20_6_0 = &streams.AppendResp_WrongExpectedVersion_NoStream_20_6_0{NoStream_20_6_0: &shared.Empty{}}
	} else {
		w.CurrentRevisionOption = &streams.AppendResp_WrongExpectedVersion_CurrentRevision{CurrentRevision: uint64(current)}
		w.CurrentRevisionOption_20_6_0 = &streams.AppendResp_WrongExpectedVersion_CurrentRevision_20_6_0{CurrentRevision_20_6_0: uint64(current)}
	}
	switch expected {
	case expectAny:
		w.ExpectedRevisionOption = &streams.AppendResp_WrongExpectedVersion_ExpectedAny{ExpectedAny: &shared.Empty{}}
		w.ExpectedRevisionOption_20_6_0 = &streams.AppendResp_WrongExpectedVersion_Any_20_6_0{Any_20_6_0: &shared.Empty{}}
	case expectExists:
		w.ExpectedRevisionOption = &streams.AppendResp_WrongExpectedVersion_ExpectedStreamExists{ExpectedStreamExists: &shared.Empty{}}
		w.ExpectedRevisionOption_20_6_0 = &streams.AppendResp_WrongExpectedVersion_StreamExists_20_6_0{StreamExists_20_6_0: &shared.Empty{}}
	case expectNone:
		w.ExpectedRevisionOption = &streams.AppendResp_WrongExpectedVersion_ExpectedNoStream{ExpectedNoStream: &shared.Empty{}}
	default:
		w.ExpectedRevisionOption = &streams.AppendResp_WrongExpectedVersion_ExpectedRevision{ExpectedRevision: uint64(expected)}
		w.ExpectedRevisionOption_20_6_0 = &streams.AppendResp_WrongExpectedVersion_ExpectedRevision_20_6_0{ExpectedRevision_20_6_0: uint64(expected)}
	}
	return &streams.AppendResp{Result: &streams.AppendResp_WrongExpectedVersion_{WrongExpectedVersion: w}}
}

func toRecord(ctx context.Context, stream string, p *streams.AppendReq_ProposedMessage) (*record, error) {
	r := &record{stream: stream, data: p.GetData(), meta: p.GetCustomMetadata()}
	for _, name := range []string{"type", "content-type"} {
		if _, ok := p.GetMetadata()[name]; !ok {
			return nil, refuseMissingProperty(ctx, name)
		}
	}
	if r.eventType = p.GetMetadata()["type"]; r.eventType == "" {
		return nil, invalid("Empty eventType provided.")
	}
	r.json = p.GetMetadata()["content-type"] == contentJSON
	var err error
	if r.id, err = fromUUID(p.GetId()); err != nil {
		return nil, err
	}
	if r.id == uuid.Nil {
		return nil, invalid("Empty eventId provided.")
	}
	return r, nil
}

// Delete deletes a stream softly.
func (s *streamsService) Delete(ctx context.Context, request *streams.DeleteReq) (*streams.DeleteResp, error) {
	var expected int64
	switch e := request.GetOptions().GetExpectedStreamRevision().(type) {
	case *streams.DeleteReq_Options_Revision:
		expected = int64(min(e.Revision, math.MaxInt64))
	case *streams.DeleteReq_Options_NoStream:
		expected = expectNone
	case *streams.DeleteReq_Options_Any:
		expected = expectAny
	case *streams.DeleteReq_Options_StreamExists:
		expected = expectExists
	default:
		return nil, invalid("The deletion says no expected revision")
	}
	position, err := s.remove(ctx, request.GetOptions().GetStreamIdentifier(), expected, false)
	if err != nil {
		return nil, err
	}
	return &streams.DeleteResp{PositionOption: &streams.DeleteResp_Position_{
		Position: &streams.DeleteResp_Position{CommitPosition: position, PreparePosition: position},
	}}, nil
}

// Tombstone deletes a stream for ever.
func (s *streamsService) Tombstone(ctx context.Context, request *streams.TombstoneReq) (*streams.TombstoneResp, error) {
	var expected int64
	switch e := request.GetOptions().GetExpectedStreamRevision().(type) {
	case *streams.TombstoneReq_Options_Revision:
		expected = int64(min(e.Revision, math.MaxInt64))
	case *streams.TombstoneReq_Options_NoStream:
		expected = expectNone
	case *streams.TombstoneReq_Options_Any:
		expected = expectAny
	case *streams.TombstoneReq_Options_StreamExists:
		expected = expectExists
	default:
		return nil, invalid("The tombstone says no expected revision")
	}
	position, err := s.remove(ctx, request.GetOptions().GetStreamIdentifier(), expected, true)
	if err != nil {
		return nil, err
	}
	return &streams.TombstoneResp{PositionOption: &streams.TombstoneResp_Position_{
		Position: &streams.TombstoneResp_Position{CommitPosition: position, PreparePosition: position},
	}}, nil
}

func (s *streamsService) remove(ctx context.Context, identifier *shared.StreamIdentifier, expected int64, hard bool) (uint64, error) {
	name, err := streamName(identifier)
	if err != nil {
		return 0, err
	}
	if err := s.leads(ctx); err != nil {
		return 0, err
	}
	o, err := s.node.do(ctx, func(l *log) outcome { return l.remove(name, expected, hard) })
	if err != nil {
		return 0, refuseFailed(err)
	}
	switch o.verdict {
	case streamDeleted:
		return 0, refuseDeleted(ctx, name)
	case wrongVersion:
		return 0, refuseWrongVersion(ctx, name, expected, o.current)
	}
	return o.position, nil
}

func streamName(identifier *shared.StreamIdentifier) (string, error) {
	name := string(identifier.GetStreamName())
	if name == "" || name == "$$" {
		return "", invalid("The stream name %q is invalid", name)
	}
	return name, nil
}

func fromUUID(u *shared.UUID) (uuid.UUID, error) {
	switch v := u.GetValue().(type) {
	case *shared.UUID_Structured_:
		var id uuid.UUID
		binary.BigEndian.PutUint64(id[:8], uint64(v.Structured.GetMostSignificantBits()))
		binary.BigEndian.PutUint64(id[8:], uint64(v.Structured.GetLeastSignificantBits()))
		return id, nil
	case *shared.UUID_String_:
		id, err := uuid.Parse(v.String_)
		if err != nil {
			return id, invalid("The event id %q is no UUID", v.String_)
		}
		return id, nil
	}
	return uuid.Nil, nil
}

func toUUID(id uuid.UUID, text bool) *shared.UUID {
	if text {
		return &shared.UUID{Value: &shared.UUID_String_{String_: id.String()}}
	}
	return &shared.UUID{Value: &shared.UUID_Structured_{Structured: &shared.UUID_Structured{
		MostSignificantBits:  int64(binary.BigEndian.Uint64(id[:8])),
		LeastSignificantBits: int64(binary.BigEndian.Uint64(id[8:])),
	}}}
}

func (r *record) recorded(textIDs bool) *streams.ReadResp_ReadEvent_RecordedEvent {
	content := contentBinary
	if r.json {
		content = contentJSON
	}
	return &streams.ReadResp_ReadEvent_RecordedEvent{
		Id:               toUUID(r.id, textIDs),
		StreamIdentifier: &shared.StreamIdentifier{StreamName: []byte(r.stream)},
		StreamRevision:   uint64(r.revision),
		PreparePosition:  r.position,
		CommitPosition:   r.position,
		Metadata: map[string]string{
			"type": r.eventType, "content-type": content, "created": strconv.FormatInt(r.created, 10),
		},
		CustomMetadata: r.meta,
		Data:           r.data,
	}
}

var errPosition = status.Error(codes.InvalidArgument, "Trying to read from an invalid position.")
