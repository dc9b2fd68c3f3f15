package esdbserver_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/internal/esdbserver"
)

// The tests are named after the points of the list of what a real server does.

func TestPoint01_NoStreamOnANewStream(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.append("b-1", esdb.NoStream{}, 2, events(3)...)
		require.Equal(t, []uint64{0, 1, 2}, t.revisions("b-1", esdb.ReadStreamOptions{}, most))
	})
}

func TestPoint02_PositionsGrowWithGaps(t *testing.T) {
	both(t, func(t *kit) {
		var before uint64
		for i := range uint64(5) {
			r := t.append("a", esdb.Any{}, i, event(`{}`))
			require.Greater(t, r.CommitPosition, before+1, "positions are not countable")
			before = r.CommitPosition
		}
		all := t.readAll(esdb.ReadAllOptions{}, most)
		require.Equal(t, before, all[len(all)-1].Event.Position.Commit)
		before = 0
		for i, e := range all {
			require.Greater(t, e.Event.Position.Commit, before+uint64(i), "positions are not countable")
			require.Equal(t, e.Event.Position.Commit, e.Event.Position.Prepare)
			before = e.Event.Position.Commit
		}
	})
}

func TestPoint03_AnAppendIsAtomic(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 2, events(3)...)
		t.append("a", esdb.Revision(2), 1002, events(1000)...)
		t.append("many", esdb.NoStream{}, 4999, events(5000)...)
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.Revision(2), events(3)...)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 1003)
		require.Len(t, t.revisions("many", esdb.ReadStreamOptions{}, most), 5000)
	})
}

func TestPoint04_ARevisionIsTheLastOne(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 2, events(3)...)
		require.ErrorContains(t, t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.Revision(1), event(`{}`)), "expecting '1' but got '2'")
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.Revision(3), event(`{}`))
		require.ErrorContains(t, t.refused(esdb.ErrorCodeWrongExpectedVersion, "none", esdb.Revision(0), event(`{}`)), "got 'no_stream'")
		t.append("a", esdb.Revision(2), 3, event(`{}`))
	})
}

func TestPoint05_StreamExistsOnAMissingStream(t *testing.T) {
	both(t, func(t *kit) {
		require.ErrorContains(t, t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.StreamExists{}, event(`{}`)), "expecting 'stream_exists' but got 'no_stream'")
		t.append("a", esdb.Any{}, 0, event(`{}`))
		t.append("a", esdb.StreamExists{}, 1, event(`{}`))
	})
}

func TestPoint06_StreamExistsWithMetadataAlone(t *testing.T) {
	both(t, func(t *kit) {
		t.setMetadata("a", esdb.NoStream{}, `{"$maxCount":5}`)
		t.append("a", esdb.StreamExists{}, 0, event(`{}`))
	})
}

func TestPoint07_StreamExistsOnADeletedStream(t *testing.T) {
	both(t, func(t *kit) {
		t.append("soft", esdb.Any{}, 0, event(`{}`))
		t.delete("soft", esdb.Any{})
		t.refused(esdb.ErrorCodeStreamDeleted, "soft", esdb.StreamExists{}, event(`{}`))
		t.tombstone("hard", esdb.Any{})
		t.refused(esdb.ErrorCodeStreamDeleted, "hard", esdb.StreamExists{}, event(`{}`))
	})
}

func TestPoint08_NoStreamOnAnExistingStream(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 1, events(2)...)
		require.ErrorContains(t, t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.NoStream{}, event(`{}`)), "expecting 'no_stream' but got '1'")
	})
}

func TestPoint09_ARepeatWithARevisionWritesNothing(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 0, event(`{}`))
		batch := events(3)
		first := t.append("a", esdb.Revision(0), 3, batch...)
		t.append("a", esdb.Revision(3), 4, event(`{}`))
		again := t.append("a", esdb.Revision(0), 3, batch...)
		require.Equal(t, first.CommitPosition, again.CommitPosition)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 5)
		require.NoError(t, t.server.Restart())
		t.client = t.connect()
		t.append("a", esdb.Revision(0), 3, batch...)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 5)
	})
}

func TestPoint10_ARepeatOfAPrefixWritesNothing(t *testing.T) {
	both(t, func(t *kit) {
		batch := events(4)
		t.append("a", esdb.NoStream{}, 3, batch...)
		t.append("a", esdb.NoStream{}, 3, batch...)
		t.append("a", esdb.NoStream{}, 1, batch[:2]...)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 4)
	})
}

func TestPoint11_ARepeatAndANewEventIsAConflict(t *testing.T) {
	both(t, func(t *kit) {
		batch := events(3)
		t.append("a", esdb.NoStream{}, 2, batch...)
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.NoStream{}, append(batch, event(`{}`))...)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 3)
	})
}

func TestPoint12_ARepeatWithAnyWritesNothing(t *testing.T) {
	both(t, func(t *kit) {
		batch := events(3)
		first := t.append("a", esdb.Any{}, 2, batch...)
		t.append("a", esdb.Any{}, 3, event(`{}`))
		again := t.append("a", esdb.Any{}, 2, batch...)
		require.Equal(t, first.CommitPosition, again.CommitPosition)
		t.append("a", esdb.StreamExists{}, 1, batch[1])
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 4)
	})
}

func TestPoint12_OnlyRecentWritesAreKnown(t *testing.T) {
	both(t, func(t *kit) {
		batch := events(3)
		t.append("a", esdb.Any{}, 2, batch...)
		t.append("b", esdb.Any{}, 9, events(10)...)
		t.append("a", esdb.Any{}, 5, batch...)
		t.append("a", esdb.NoStream{}, 2, batch...)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 6)
	}, esdbserver.RecentWrites(10))
}

func TestPoint13_AnyWithAnUnseenFirstID(t *testing.T) {
	both(t, func(t *kit) {
		batch := events(2)
		t.append("a", esdb.Any{}, 1, batch...)
		t.append("a", esdb.Any{}, 3, event(`{}`), batch[0])
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.Any{}, batch[0], event(`{}`))
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 4)
	})
}

func TestPoint14_AnUsedIDAtTheLastRevisionIsWritten(t *testing.T) {
	both(t, func(t *kit) {
		e := event(`{}`)
		t.append("a", esdb.Any{}, 0, e)
		t.append("a", esdb.Revision(0), 1, e)
		all, err := t.read("a", esdb.ReadStreamOptions{}, most)
		require.NoError(t, err)
		require.Len(t, all, 2)
		require.Equal(t, all[0].Event.EventID, all[1].Event.EventID)
	})
}

func TestPoint15_AnIDInAnotherStreamIsNoRepeat(t *testing.T) {
	both(t, func(t *kit) {
		e := event(`{}`)
		t.append("a", esdb.Any{}, 0, e)
		t.append("b", esdb.Any{}, 0, e)
		t.append("a", esdb.Any{}, 0, e)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 1)
		require.Len(t, t.revisions("b", esdb.ReadStreamOptions{}, most), 1)
	})
}

func TestPoint16_SixEventsWithOneID(t *testing.T) {
	both(t, func(t *kit) {
		e := event(`{}`)
		six := []esdb.EventData{e, e, e, e, e, e}
		t.append("a", esdb.Any{}, 5, six...)
		t.append("a", esdb.NoStream{}, 5, six...)
		_, err := t.try("a", esdb.Any{}, six...)
		require.NoError(t, err)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 6)
	})
}

func TestPoint17_NoEventsWriteNothing(t *testing.T) {
	both(t, func(t *kit) {
		_, err := t.try("a", esdb.Any{})
		require.NoError(t, err)
		_, err = t.try("a", esdb.NoStream{})
		require.NoError(t, err)
		_, err = t.read("a", esdb.ReadStreamOptions{}, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.NoStream{})
	})
}

func TestPoint18_TooLarge(t *testing.T) {
	both(t, func(t *kit) {
		large := event(strings.Repeat("x", esdbserver.DefaultMaxAppendBytes))
		t.append("full", esdb.Any{}, 0, large)
		trailers, err := t.raw("a", func(call streams.Streams_AppendClient) {
			for _, size := range []int{esdbserver.DefaultMaxAppendBytes, 1} {
				_ = call.Send(proposed(uuid.New(), "happened", make([]byte, size)))
			}
		})
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
		require.Equal(t, []string{"maximum-append-size-exceeded"}, trailers.Get("exception"))
		_, err = t.try("a", esdb.Any{}, large, event(`x`))
		require.Error(t, err)
		_, err = t.read("a", esdb.ReadStreamOptions{}, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)

		// Only the data counts.
		e := event(strings.Repeat("x", esdbserver.DefaultMaxAppendBytes))
		e.Metadata = bytes.Repeat([]byte("m"), 3<<20)
		t.append("metadata", esdb.Any{}, 0, e)
		require.NoError(t, t.server.Restart())
		t.client = t.connect()
		all, err := t.read("metadata", esdb.ReadStreamOptions{}, most)
		require.NoError(t, err)
		require.Equal(t, e.Metadata, all[0].Event.UserMetadata)
		require.Equal(t, e.Data, all[0].Event.Data)
	})
}

func TestPoint18_TheLimitCanBeSet(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 0, event("12345678"))
		_, err := t.try("a", esdb.Any{}, event("123456789"))
		require.ErrorContains(t, err, "Maximum Append Size of 8 Exceeded")
	}, esdbserver.MaxAppendBytes(8))
}

func TestPoint19_EmptyTypeAndIDAreRefused(t *testing.T) {
	both(t, func(t *kit) {
		for name, send := range map[string]*streams.AppendReq{
			"type":         proposed(uuid.New(), "", nil),
			"id":           proposed(uuid.Nil, "happened", nil),
			"content type": {Content: &streams.AppendReq_ProposedMessage_{ProposedMessage: &streams.AppendReq_ProposedMessage{Metadata: map[string]string{"type": "happened"}}}},
			"id's text": {Content: &streams.AppendReq_ProposedMessage_{ProposedMessage: &streams.AppendReq_ProposedMessage{
				Id:       &shared.UUID{Value: &shared.UUID_String_{String_: "no"}},
				Metadata: map[string]string{"type": "happened", "content-type": "application/json"},
			}}},
		} {
			_, err := t.raw("a", func(call streams.Streams_AppendClient) { _ = call.Send(send) })
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%s: %v", name, err)
		}
		for _, name := range []string{"", "$$"} {
			_, err := t.raw(name, func(call streams.Streams_AppendClient) { _ = call.Send(proposed(uuid.New(), "happened", nil)) })
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%q: %v", name, err)
		}
		_, err := t.read("a", esdb.ReadStreamOptions{}, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)

		e := event("")
		t.append("a", esdb.Any{}, 0, e)
		all, err := t.read("a", esdb.ReadStreamOptions{}, most)
		require.NoError(t, err)
		require.Empty(t, all[0].Event.Data)
		require.Empty(t, all[0].Event.UserMetadata)
	})
}

func TestPoint20_TheContentTypeSurvives(t *testing.T) {
	both(t, func(t *kit) {
		e, f := event(`{}`), event(`{}`)
		f.ContentType = esdb.ContentTypeBinary
		t.append("a", esdb.Any{}, 1, e, f)
		all, err := t.read("a", esdb.ReadStreamOptions{}, most)
		require.NoError(t, err)
		require.Equal(t, "application/json", all[0].Event.ContentType)
		require.Equal(t, "application/octet-stream", all[1].Event.ContentType)
	})
}

func TestPoint21_BytesAndNamesSurvive(t *testing.T) {
	both(t, func(t *kit) {
		for i, name := range []string{"no dash", "ünï/cødé-*.>", "a\tb\n", "-", "a", "A", strings.Repeat("long", 1000)} {
			e := event("\x00\xff{")
			e.Metadata = []byte("\xfe\x00")
			e.EventType = strings.Repeat("type\t", 100) + name
			t.append(name, esdb.NoStream{}, 0, e)
			t.append(name, esdb.Revision(0), uint64(i)+1, events(i+1)...)
			require.NoError(t, t.server.Restart())
			t.client = t.connect()
			all, err := t.read(name, esdb.ReadStreamOptions{}, most)
			require.NoError(t, err)
			require.Len(t, all, i+2)
			require.Equal(t, e.Data, all[0].Event.Data)
			require.Equal(t, e.Metadata, all[0].Event.UserMetadata)
			require.Equal(t, e.EventType, all[0].Event.EventType)
			require.Equal(t, e.EventID, all[0].Event.EventID)
			require.Equal(t, name, all[0].Event.StreamID)
		}
	})
}

func TestPoint22_AnAppendCutOff(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		batch := events(2)
		t.server.CutAppends(esdbserver.BeforeWritten, 1)
		_, err := t.try("a", esdb.Revision(0), batch...)
		t.isError(esdb.ErrorUnavailable, err)
		t.client = t.connect()
		require.Equal(t, []uint64{0}, t.revisions("a", esdb.ReadStreamOptions{}, most))

		t.server.CutAppends(esdbserver.AfterWritten, 1)
		_, err = t.try("a", esdb.Revision(0), batch...)
		t.isError(esdb.ErrorUnavailable, err)
		t.client = t.connect()
		require.Equal(t, []uint64{0, 1, 2}, t.revisions("a", esdb.ReadStreamOptions{}, most))
		t.append("a", esdb.Revision(0), 2, batch...)
		require.Equal(t, []uint64{0, 1, 2}, t.revisions("a", esdb.ReadStreamOptions{}, most))
	})
}

// Of writers who expect the same revision one wins; the server judges them in
// batches, which are held together by a gate in front of the appends.
func TestConcurrentAppendsHaveOneWinner(t *testing.T) {
	both(t, func(t *kit) {
		const writers, rounds = 16, 5
		for round := range rounds {
			gate := make(chan struct{})
			waiting := make(chan struct{}, writers)
			t.server.Intercept(func(_ context.Context, method string) error {
				if strings.HasSuffix(method, "/Append") {
					waiting <- struct{}{}
					<-gate
				}
				return nil
			})
			results := make(chan error, writers)
			for range writers {
				go func() {
					var expected esdb.ExpectedRevision = esdb.NoStream{}
					if round > 0 {
						expected = esdb.Revision(uint64(2*round - 1))
					}
					_, err := t.try("a", expected, events(2)...)
					results <- err
				}()
			}
			for range writers {
				<-waiting
			}
			close(gate)
			won := 0
			for range writers {
				if err := <-results; err == nil {
					won++
				} else {
					t.isError(esdb.ErrorCodeWrongExpectedVersion, err)
				}
			}
			require.Equal(t, 1, won)
		}
		t.server.Intercept(nil)
		require.Len(t, t.revisions("a", esdb.ReadStreamOptions{}, most), 2*rounds)
	})
}

func (t *kit) dial() *grpc.ClientConn {
	conn, err := grpc.NewClient(t.server.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// raw appends with the stubs alone.
func (t *kit) raw(stream string, send func(streams.Streams_AppendClient)) (metadata.MD, error) {
	call, err := streams.NewStreamsClient(t.dial()).Append(t.ctx)
	require.NoError(t, err)
	require.NoError(t, call.Send(&streams.AppendReq{Content: &streams.AppendReq_Options_{Options: &streams.AppendReq_Options{
		StreamIdentifier:       &shared.StreamIdentifier{StreamName: []byte(stream)},
		ExpectedStreamRevision: &streams.AppendReq_Options_Any{Any: &shared.Empty{}},
	}}}))
	send(call)
	_, err = call.CloseAndRecv()
	return call.Trailer(), err
}

func proposed(id uuid.UUID, eventType string, data []byte) *streams.AppendReq {
	return &streams.AppendReq{Content: &streams.AppendReq_ProposedMessage_{ProposedMessage: &streams.AppendReq_ProposedMessage{
		Id:       &shared.UUID{Value: &shared.UUID_String_{String_: id.String()}},
		Metadata: map[string]string{"type": eventType, "content-type": "application/json"},
		Data:     data,
	}}}
}

func (t *kit) setMetadata(stream string, expected esdb.ExpectedRevision, json string) *esdb.WriteResult {
	r, err := t.try("$$"+stream, expected, esdb.EventData{
		EventID: uuid.New(), EventType: "$metadata", ContentType: esdb.ContentTypeJson, Data: []byte(json),
	})
	require.NoError(t, err)
	return r
}

// metadata returns the last metadata event of a stream, and its revision.
func (t *kit) metadata(stream string) (string, uint64) {
	all, err := t.read("$$"+stream, esdb.ReadStreamOptions{Direction: esdb.Backwards, From: esdb.End{}}, 1)
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Equal(t, "$metadata", all[0].Event.EventType)
	return string(all[0].Event.Data), all[0].Event.EventNumber
}

func (t *kit) delete(stream string, expected esdb.ExpectedRevision) esdb.Position {
	r, err := t.client.DeleteStream(t.ctx, stream, esdb.DeleteStreamOptions{ExpectedRevision: expected})
	require.NoError(t, err)
	return r.Position
}

func (t *kit) tombstone(stream string, expected esdb.ExpectedRevision) esdb.Position {
	r, err := t.client.TombstoneStream(t.ctx, stream, esdb.TombstoneStreamOptions{ExpectedRevision: expected})
	require.NoError(t, err)
	return r.Position
}

func maxTruncate() string { return fmt.Sprintf(`{"$tb":%d}`, uint64(1<<63-1)) }

// stopwatch is a clock that tests move.
type stopwatch struct{ at chan time.Time }

func newStopwatch(at time.Time) *stopwatch {
	s := &stopwatch{at: make(chan time.Time, 1)}
	s.at <- at
	return s
}

func (s *stopwatch) now() time.Time {
	at := <-s.at
	s.at <- at
	return at
}

func (s *stopwatch) advance(d time.Duration) { s.at <- (<-s.at).Add(d) }
