package esdbserver_test

import (
	"errors"
	"io"
	"strconv"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/internal/esdbserver"
)

var (
	forward  = esdb.ReadStreamOptions{}
	backward = esdb.ReadStreamOptions{Direction: esdb.Backwards, From: esdb.End{}}
)

func from(revision uint64, direction esdb.Direction) esdb.ReadStreamOptions {
	return esdb.ReadStreamOptions{Direction: direction, From: esdb.Revision(revision)}
}

func TestPoint23_ForwardFromStart(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 4, events(5)...)
		require.Equal(t, []uint64{0, 1, 2, 3, 4}, t.revisions("a", forward, most))
		require.Equal(t, []uint64{0, 1}, t.revisions("a", forward, 2))
		require.Equal(t, []uint64{0, 1, 2, 3, 4}, t.revisions("a", forward, 5))
	})
}

func TestPoint24_BackwardIsInclusive(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 4, events(5)...)
		require.Equal(t, []uint64{4, 3, 2, 1, 0}, t.revisions("a", backward, most))
		require.Equal(t, []uint64{4, 3}, t.revisions("a", backward, 2))
		require.Equal(t, []uint64{2, 1, 0}, t.revisions("a", from(2, esdb.Backwards), most))
		require.Equal(t, []uint64{0}, t.revisions("a", from(0, esdb.Backwards), most))
	})
}

func TestPoint25_ForwardIsInclusive(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 4, events(5)...)
		require.Equal(t, []uint64{2, 3, 4}, t.revisions("a", from(2, esdb.Forwards), most))
	})
}

func TestPoint26_FromBeyondTheLast(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 4, events(5)...)
		require.Empty(t, t.revisions("a", from(5, esdb.Forwards), most))
		require.Empty(t, t.revisions("a", esdb.ReadStreamOptions{From: esdb.End{}}, most))
		require.Equal(t, []uint64{4, 3}, t.revisions("a", from(99, esdb.Backwards), 2))
		require.Equal(t, []uint64{0}, t.revisions("a", esdb.ReadStreamOptions{Direction: esdb.Backwards, From: esdb.Start{}}, most))
	})
}

func TestPoint27_AMissingStreamIsNotFound(t *testing.T) {
	both(t, func(t *kit) {
		for _, o := range []esdb.ReadStreamOptions{forward, backward, from(7, esdb.Forwards)} {
			stream, err := t.client.ReadStream(t.ctx, "none", o, 10)
			require.NoError(t, err)
			_, err = stream.Recv()
			t.isError(esdb.ErrorCodeResourceNotFound, err)
			stream.Close()
		}
	})
}

func TestPoint28_ATombstonedStreamIsDeleted(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 1, events(2)...)
		t.setMetadata("a", esdb.Any{}, `{"$maxCount":1}`)
		t.tombstone("a", esdb.Revision(1))
		for _, stream := range []string{"a", "$$a"} {
			for _, o := range []esdb.ReadStreamOptions{forward, backward} {
				_, err := t.read(stream, o, most)
				t.isError(esdb.ErrorCodeStreamDeleted, err)
			}
		}
		t.refused(esdb.ErrorCodeStreamDeleted, "$$a", esdb.Any{}, event(`{}`))
	})
}

func TestPoint30_AfterTheEndThereIsNoMore(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 0, event(`{}`))
		stream, err := t.client.ReadStream(t.ctx, "a", forward, 10)
		require.NoError(t, err)
		defer stream.Close()
		_, err = stream.Recv()
		require.NoError(t, err)
		for range 3 {
			_, err = stream.Recv()
			require.ErrorIs(t, err, io.EOF)
		}
	})
}

func TestPoint31_TheServerDatesEvents(t *testing.T) {
	clock := newStopwatch(time.Date(2026, 2, 3, 4, 5, 6, 123_456_789, time.FixedZone("plus", 3600)))
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 0, event(`{}`))
		require.NoError(t, t.server.Restart())
		t.client = t.connect()
		all, err := t.read("a", forward, most)
		require.NoError(t, err)
		require.Equal(t, time.Date(2026, 2, 3, 3, 5, 6, 123_456_700, time.UTC), all[0].Event.CreatedDate)
	}, esdbserver.Clock(clock.now))
}

func link(revision int, stream string) esdb.EventData {
	return esdb.EventData{
		EventID: uuid.New(), EventType: "$>", ContentType: esdb.ContentTypeBinary, Data: []byte(strconv.Itoa(revision) + "@" + stream),
	}
}

func TestPoint32_LinksAreResolved(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a@b", esdb.Any{}, 1, events(2)...)
		t.append("gone", esdb.Any{}, 0, event(`{}`))
		t.setMetadata("a@b", esdb.Any{}, `{"$tb":1}`)
		t.append("links", esdb.Any{}, 5, link(1, "a@b"), link(0, "gone"), link(9, "a@b"), link(0, "none"), link(0, "a@b"), event(`{}`))
		t.tombstone("gone", esdb.Any{})
		check := func(all []*esdb.ResolvedEvent) {
			require.Len(t, all, 6)
			require.Equal(t, "links", all[0].Link.StreamID)
			require.Equal(t, "$>", all[0].Link.EventType)
			require.Equal(t, "a@b", all[0].Event.StreamID)
			require.Equal(t, uint64(1), all[0].Event.EventNumber)
			for i := 1; i < 5; i++ {
				require.Equal(t, uint64(i), all[i].Link.EventNumber)
				require.Nil(t, all[i].Event)
			}
			require.Nil(t, all[5].Link)
			require.Equal(t, "links", all[5].Event.StreamID)
		}
		all, err := t.read("links", esdb.ReadStreamOptions{ResolveLinkTos: true}, most)
		require.NoError(t, err)
		check(all)
		s := t.follow("links", esdb.SubscribeToStreamOptions{From: esdb.Start{}, ResolveLinkTos: true})
		all = nil
		for range 6 {
			all = append(all, t.next(s))
		}
		check(all)
		all = nil
		for _, e := range t.readAll(esdb.ReadAllOptions{ResolveLinkTos: true}, most) {
			if e.OriginalEvent().StreamID == "links" {
				all = append(all, e)
			}
		}
		check(all)
	})
}

func TestPoint33_LinksAreNotResolvedUnasked(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.Any{}, 1, events(2)...)
		t.append("links", esdb.Any{}, 0, link(1, "a"))
		all, err := t.read("links", forward, most)
		require.NoError(t, err)
		require.Nil(t, all[0].Link)
		require.Equal(t, "$>", all[0].Event.EventType)
		require.Equal(t, "1@a", string(all[0].Event.Data))
	})
}

func TestPoint34_ASoftDeletedStreamIsNotFound(t *testing.T) {
	both(t, func(t *kit) {
		written := t.append("a", esdb.Any{}, 1, events(2)...)
		deleted := t.delete("a", esdb.Revision(1))
		require.Greater(t, deleted.Commit, written.CommitPosition)
		require.Equal(t, deleted.Commit, deleted.Prepare)
		for _, o := range []esdb.ReadStreamOptions{forward, backward} {
			_, err := t.read("a", o, most)
			t.isError(esdb.ErrorCodeResourceNotFound, err)
		}
	})
}

func TestPoint35_ASoftDeletedStreamGoesOn(t *testing.T) {
	both(t, func(t *kit) {
		for name, expected := range map[string]esdb.ExpectedRevision{"no stream": esdb.NoStream{}, "any": esdb.Any{}, "revision": esdb.Revision(1)} {
			t.append(name, esdb.NoStream{}, 1, events(2)...)
			t.delete(name, esdb.Any{})
			t.append(name, expected, 4, events(3)...)
			require.Equal(t, []uint64{2, 3, 4}, t.revisions(name, forward, most), name)
			require.Equal(t, []uint64{4, 3, 2}, t.revisions(name, backward, most), name)
			require.NoError(t, t.server.Restart())
			t.client = t.connect()
			require.Equal(t, []uint64{2, 3, 4}, t.revisions(name, from(0, esdb.Forwards), most), name)
			t.delete(name, esdb.Revision(4))
			t.append(name, esdb.NoStream{}, 5, event(`{}`))
			require.Equal(t, []uint64{5}, t.revisions(name, forward, most), name)
		}
	})
}

func TestPoint36_NoStreamHoldsOnceAfterTheDelete(t *testing.T) {
	both(t, func(t *kit) {
		first := events(2)
		t.append("a", esdb.NoStream{}, 1, first...)
		t.delete("a", esdb.Any{})
		t.append("a", esdb.NoStream{}, 1, first...) // a repeat writes nothing, and recreates nothing
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.NoStream{}, first[0], event(`{}`))
		_, err := t.read("a", forward, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)
		t.append("a", esdb.NoStream{}, 2, event(`{}`))
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "a", esdb.NoStream{}, event(`{}`))
		require.Equal(t, []uint64{2}, t.revisions("a", forward, most))
	})
}

func TestPoint37_RecreationKeepsOtherMetadata(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		t.setMetadata("a", esdb.NoStream{}, `{"$tb":9223372036854775807,"$maxCount":100,"mine":{"x":[1]}}`)
		_, err := t.read("a", forward, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)
		t.append("a", esdb.NoStream{}, 3, events(2)...)
		data, revision := t.metadata("a")
		require.Equal(t, uint64(1), revision)
		require.JSONEq(t, `{"$tb":2,"$maxCount":100,"mine":{"x":[1]}}`, data)
	})
}

func TestPoint37_MetadataRecreatesAStream(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		t.delete("a", esdb.Any{})
		t.setMetadata("a", esdb.Revision(0), `{"$maxCount":7}`)
		data, revision := t.metadata("a")
		require.Equal(t, uint64(2), revision)
		require.JSONEq(t, `{"$tb":2,"$maxCount":7}`, data)
		require.Empty(t, t.revisions("a", forward, most))
		t.append("a", esdb.Revision(1), 2, event(`{}`))
		require.Equal(t, []uint64{2}, t.revisions("a", forward, most))
	})
}

func TestPoint38_ASoftDeleteIsAMetadataEvent(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		deleted := t.delete("a", esdb.Any{})
		data, _ := t.metadata("a")
		require.Equal(t, maxTruncate(), data)
		last := t.readAll(esdb.ReadAllOptions{Direction: esdb.Backwards, From: esdb.End{}}, 1)[0].Event
		require.Equal(t, "$metadata", last.EventType)
		require.Equal(t, "$$a", last.StreamID)
		require.Equal(t, deleted, last.Position)
	})
}

func TestPoint39_DeleteWithAWrongRevision(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		for _, c := range []struct {
			stream   string
			expected esdb.ExpectedRevision
			says     string
		}{
			{"a", esdb.Revision(0), "Stream: a, Expected version: 0, Actual version: 1"},
			{"a", esdb.NoStream{}, "Stream: a, Expected version: -1, Actual version: 1"},
			{"none", esdb.Revision(0), "Stream: none, Expected version: 0, Actual version: -1"},
			{"none", esdb.StreamExists{}, "Stream: none, Expected version: -4, Actual version: -1"},
		} {
			_, err := t.client.DeleteStream(t.ctx, c.stream, esdb.DeleteStreamOptions{ExpectedRevision: c.expected})
			require.ErrorContains(t, err, "WrongExpectedVersion. "+c.says)
			_, err = t.client.TombstoneStream(t.ctx, c.stream, esdb.TombstoneStreamOptions{ExpectedRevision: c.expected})
			require.ErrorContains(t, err, "WrongExpectedVersion. "+c.says)
		}
		call := streams.NewStreamsClient(t.dial())
		_, err := call.Delete(t.ctx, &streams.DeleteReq{Options: &streams.DeleteReq_Options{
			StreamIdentifier:       &shared.StreamIdentifier{StreamName: []byte("a")},
			ExpectedStreamRevision: &streams.DeleteReq_Options_Revision{Revision: 5},
		}})
		require.Equal(t, codes.FailedPrecondition, status.Code(err))
		require.Equal(t, []uint64{0, 1}, t.revisions("a", forward, most))
	})
}

func TestPoint40_Tombstones(t *testing.T) {
	both(t, func(t *kit) {
		t.tombstone("a", esdb.Any{})
		t.tombstone("b", esdb.NoStream{})
		for _, stream := range []string{"a", "b"} {
			_, err := t.client.TombstoneStream(t.ctx, stream, esdb.TombstoneStreamOptions{ExpectedRevision: esdb.Any{}})
			t.isError(esdb.ErrorCodeStreamDeleted, err)
			_, err = t.client.DeleteStream(t.ctx, stream, esdb.DeleteStreamOptions{ExpectedRevision: esdb.Any{}})
			t.isError(esdb.ErrorCodeStreamDeleted, err)
		}
	})
}

func TestPoint41_NoAppendAfterATombstone(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		t.tombstone("a", esdb.Revision(1))
		require.NoError(t, t.server.Restart())
		t.client = t.connect()
		for _, expected := range []esdb.ExpectedRevision{esdb.NoStream{}, esdb.Any{}, esdb.StreamExists{}, esdb.Revision(1), esdb.Revision(1<<63 - 1)} {
			t.refused(esdb.ErrorCodeStreamDeleted, "a", expected, event(`{}`))
		}
	})
}

func TestPoint42_ATombstoneIsASystemEvent(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		at := t.tombstone("a", esdb.Any{})
		all := t.readAll(esdb.ReadAllOptions{Direction: esdb.Backwards, From: esdb.End{}}, 2)
		require.Equal(t, "$streamDeleted", all[0].Event.EventType)
		require.Equal(t, "a", all[0].Event.StreamID)
		require.Equal(t, uint64(1<<63-1), all[0].Event.EventNumber)
		require.Equal(t, at, all[0].Event.Position)
		require.Equal(t, uint64(1), all[1].Event.EventNumber, "what was there is still in $all")
	})
}

func TestPoint43_ASoftDeletedStreamCanBeTombstoned(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		t.delete("a", esdb.Any{})
		t.tombstone("a", esdb.Any{})
		_, err := t.read("a", forward, most)
		t.isError(esdb.ErrorCodeStreamDeleted, err)
	})
}

func TestPoint44_MaxCount(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 4, events(5)...)
		t.setMetadata("a", esdb.NoStream{}, `{"$maxCount":2}`)
		require.Equal(t, []uint64{3, 4}, t.revisions("a", forward, most))
		require.Equal(t, []uint64{4, 3}, t.revisions("a", backward, most))
		t.append("a", esdb.Revision(4), 5, event(`{}`))
		require.Equal(t, []uint64{4, 5}, t.revisions("a", forward, most))
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, uint64(4), t.next(s).Event.EventNumber)
		t.setMetadata("a", esdb.Revision(0), `{"$maxCount":4}`)
		require.Equal(t, []uint64{2, 3, 4, 5}, t.revisions("a", forward, most))
	})
}

func TestPoint45_TruncateBefore(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 4, events(5)...)
		t.setMetadata("a", esdb.NoStream{}, `{"$tb":3}`)
		require.Equal(t, []uint64{3, 4}, t.revisions("a", forward, most))
		t.setMetadata("a", esdb.Revision(0), `{"$tb":9}`)
		require.Empty(t, t.revisions("a", forward, most), "the stream is there, and empty")
		t.setMetadata("a", esdb.Revision(1), `{}`)
		require.Len(t, t.revisions("a", forward, most), 5)
	})
}

func TestPoint45_MaxAge(t *testing.T) {
	t.Parallel()
	clock := newStopwatch(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	k := over(t, newMemory(t), esdbserver.Clock(clock.now))
	k.append("a", esdb.NoStream{}, 1, events(2)...)
	k.setMetadata("a", esdb.NoStream{}, `{"$maxAge":10}`)
	clock.advance(8 * time.Second)
	k.append("a", esdb.Any{}, 2, event(`{}`))
	require.Equal(t, []uint64{0, 1, 2}, k.revisions("a", forward, most))
	clock.advance(3 * time.Second)
	require.Equal(t, []uint64{2}, k.revisions("a", forward, most))
	require.Equal(t, []uint64{2}, k.revisions("a", backward, most))
	clock.advance(8 * time.Second)
	require.Empty(t, k.revisions("a", forward, most))
	k.append("a", esdb.Revision(2), 3, event(`{}`))
	require.Equal(t, []uint64{3}, k.revisions("a", forward, most))
}

func TestPoint46_WhatIsTruncatedStaysInAll(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 4, events(5)...)
		t.setMetadata("a", esdb.NoStream{}, `{"$maxCount":1}`)
		found := 0
		for _, e := range t.readAll(esdb.ReadAllOptions{}, most) {
			if e.Event.StreamID == "a" {
				found++
			}
		}
		require.Equal(t, 5, found)
	})
}

func TestPoint47_MetadataHasRevisions(t *testing.T) {
	both(t, func(t *kit) {
		require.Equal(t, uint64(0), t.setMetadata("a", esdb.NoStream{}, `{"a":1}`).NextExpectedVersion)
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "$$a", esdb.NoStream{}, event(`{}`))
		t.refused(esdb.ErrorCodeWrongExpectedVersion, "$$a", esdb.Revision(1), event(`{}`))
		require.Equal(t, uint64(1), t.setMetadata("a", esdb.Revision(0), `{"a":2}`).NextExpectedVersion)
		data, revision := t.metadata("a")
		require.JSONEq(t, `{"a":2}`, data)
		require.Equal(t, uint64(1), revision)
		require.Equal(t, []uint64{1}, t.revisions("$$a", forward, most), "a metadata stream shows its last event")
		_, err := t.read("a", forward, most)
		t.isError(esdb.ErrorCodeResourceNotFound, err)

		var m esdb.StreamMetadata
		m.SetMaxCount(3)
		_, err = t.client.SetStreamMetadata(t.ctx, "b", esdb.AppendToStreamOptions{ExpectedRevision: esdb.NoStream{}}, m)
		require.NoError(t, err)
		got, err := t.client.GetStreamMetadata(t.ctx, "b", esdb.ReadStreamOptions{})
		require.NoError(t, err)
		require.Equal(t, uint64(3), *got.MaxCount())
	})
}

func TestPoint48_AllFromBothEnds(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		t.append("b", esdb.NoStream{}, 0, event(`{}`))
		all := t.readAll(esdb.ReadAllOptions{}, most)
		require.Equal(t, byte('$'), all[0].Event.EventType[0], "a database begins with system events")
		reverse := t.readAll(esdb.ReadAllOptions{Direction: esdb.Backwards, From: esdb.End{}}, most)
		require.Len(t, reverse, len(all))
		for i, e := range all {
			require.Equal(t, e.Event, reverse[len(all)-1-i].Event)
			require.Equal(t, e.Event.Position.Commit, *e.Commit)
		}
		require.Equal(t, "b", all[len(all)-1].Event.StreamID)
		require.Empty(t, t.readAll(esdb.ReadAllOptions{From: esdb.End{}}, most))
		require.Empty(t, t.readAll(esdb.ReadAllOptions{Direction: esdb.Backwards, From: esdb.Start{}}, most))
	})
}

func TestPoint49_ReadingAllFromAPosition(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 4, events(5)...)
		all := t.readAll(esdb.ReadAllOptions{}, most)
		at := all[len(all)-3].Event.Position
		got := t.readAll(esdb.ReadAllOptions{From: at}, most)
		require.Len(t, got, 3)
		require.Equal(t, at, got[0].Event.Position)
		got = t.readAll(esdb.ReadAllOptions{From: at, Direction: esdb.Backwards}, 2)
		require.Len(t, got, 2)
		require.Equal(t, all[len(all)-4].Event.Position, got[0].Event.Position)
		require.Len(t, t.readAll(esdb.ReadAllOptions{From: esdb.Position{}}, most), len(all))

		last := all[len(all)-1].Event.Position
		require.Empty(t, t.readAll(esdb.ReadAllOptions{From: esdb.Position{Commit: last.Commit + 1<<20, Prepare: last.Prepare + 1<<20}}, most))
		for _, p := range []esdb.Position{
			{Commit: at.Commit + 1, Prepare: at.Commit + 1}, {Commit: at.Commit, Prepare: at.Commit - 1}, {Commit: 1, Prepare: 1}, {Commit: 0, Prepare: at.Prepare},
		} {
			_, err := collect(t.client.ReadAll(t.ctx, esdb.ReadAllOptions{From: p}, most))
			require.Equal(t, codes.InvalidArgument, innermost(err), "%v: %v", p, err)
		}
	})
}

func innermost(err error) codes.Code {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return status.Code(err)
		}
		err = inner
	}
}

func TestPoint50_SystemEventsAreMarked(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.delete("a", esdb.Any{})
		t.append("a", esdb.NoStream{}, 1, event(`{}`))
		t.tombstone("b", esdb.Any{})
		var own []string
		for _, e := range t.readAll(esdb.ReadAllOptions{}, most) {
			if e.Event.StreamID[0] == '$' || e.Event.EventType[0] == '$' {
				continue
			}
			own = append(own, e.Event.StreamID)
		}
		require.Equal(t, []string{"a", "a"}, own)
	})
}

// The Go client cannot ask for a filter when it reads, others can.
func TestFilteredReadsOfAll(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a-1", esdb.NoStream{}, 1, events(2)...)
		t.append("b-1", esdb.NoStream{}, 1, events(2)...)
		t.append("a-2", esdb.NoStream{}, 1, events(2)...)
		for _, backward := range []bool{false, true} {
			o := &streams.ReadReq_Options{
				StreamOption: &streams.ReadReq_Options_All{All: &streams.ReadReq_Options_AllOptions{AllOption: &streams.ReadReq_Options_AllOptions_Start{Start: &shared.Empty{}}}},
				CountOption:  &streams.ReadReq_Options_Count{Count: 3},
				UuidOption:   &streams.ReadReq_Options_UUIDOption{Content: &streams.ReadReq_Options_UUIDOption_String_{String_: &shared.Empty{}}},
				FilterOption: &streams.ReadReq_Options_Filter{Filter: &streams.ReadReq_Options_FilterOptions{
					Filter: &streams.ReadReq_Options_FilterOptions_StreamIdentifier{StreamIdentifier: &streams.ReadReq_Options_FilterOptions_Expression{Prefix: []string{"a-"}}},
				}},
			}
			want := []string{"a-1", "a-1", "a-2"}
			if backward {
				o.ReadDirection = streams.ReadReq_Options_Backwards
				o.GetAll().AllOption = &streams.ReadReq_Options_AllOptions_End{End: &shared.Empty{}}
				want = []string{"a-2", "a-2", "a-1"}
			}
			call, err := streams.NewStreamsClient(t.dial()).Read(t.ctx, &streams.ReadReq{Options: o})
			require.NoError(t, err)
			var got []string
			for {
				m, err := call.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				require.NoError(t, err)
				got = append(got, string(m.GetEvent().GetEvent().GetStreamIdentifier().GetStreamName()))
				_, err = uuid.Parse(m.GetEvent().GetEvent().GetId().GetString_())
				require.NoError(t, err)
			}
			require.Equal(t, want, got)
		}
	})
}
