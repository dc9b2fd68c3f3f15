package esdbserver_test

import (
	"context"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/shared"
	"github.com/EventStore/EventStore-Client-Go/v4/protos/streams"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/deed-go/deed/internal/esdbserver"
)

// heard says in a few letters what a subscription said: an event's stream and
// revision, C caught up, P a checkpoint, B fell behind, or D and a status.
func (t *kit) heard(s *esdb.Subscription, n int) []string {
	t.Helper()
	var all []string
	for range n {
		m := s.Recv()
		switch {
		case m.EventAppeared != nil:
			e := m.EventAppeared.OriginalEvent()
			all = append(all, e.StreamID+":"+strconv.FormatUint(e.EventNumber, 10))
		case m.CaughtUp != nil:
			all = append(all, "C")
		case m.CheckPointReached != nil:
			all = append(all, "P")
		case m.FellBehind != nil:
			all = append(all, "B")
		case m.SubscriptionDropped != nil:
			return append(all, "D "+status.Code(m.SubscriptionDropped.Error).String())
		}
	}
	return all
}

func TestPoint51_AStreamFromARevisionIsExclusive(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 2, events(3)...)
		for _, c := range []struct {
			from esdb.StreamPosition
			want []string
		}{
			{esdb.Start{}, []string{"a:0", "a:1", "a:2", "C"}},
			{esdb.Revision(0), []string{"a:1", "a:2", "C"}},
			{esdb.Revision(2), []string{"C"}},
			{esdb.End{}, []string{"C"}},
			{nil, []string{"C"}},
		} {
			s := t.follow("a", esdb.SubscribeToStreamOptions{From: c.from})
			require.Equal(t, c.want, t.heard(s, len(c.want)), "%v", c.from)
			require.NoError(t, s.Close())
		}
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.End{}})
		beyond := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Revision(3)})
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		t.append("a", esdb.Revision(2), 4, events(2)...)
		require.Equal(t, []string{"a:3", "a:4"}, t.heard(s, 2))
		require.Equal(t, []string{"C", "a:4"}, t.heard(beyond, 2))
	})
}

func TestPoint52_AllFromAPositionIsExclusive(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 2, events(3)...)
		all := t.readAll(esdb.ReadAllOptions{}, most)
		for _, start := range []esdb.AllPosition{esdb.Start{}, esdb.Position{}} {
			s := t.followAll(esdb.SubscribeToAllOptions{From: start})
			for _, e := range all {
				require.Equal(t, e.Event.Position, t.next(s).Event.Position)
			}
		}
		s := t.followAll(esdb.SubscribeToAllOptions{From: all[len(all)-2].Event.Position})
		require.Equal(t, []string{"a:2", "C"}, t.heard(s, 2))
		end := t.followAll(esdb.SubscribeToAllOptions{From: esdb.End{}})
		require.Equal(t, []string{"C"}, t.heard(end, 1))
		t.append("b", esdb.NoStream{}, 0, event(`{}`))
		require.Equal(t, []string{"b:0"}, t.heard(end, 1))
		require.Equal(t, []string{"b:0"}, t.heard(s, 1))

		_, err := t.client.SubscribeToAll(t.ctx, esdb.SubscribeToAllOptions{From: esdb.Position{Commit: 1, Prepare: 1}})
		require.Equal(t, codes.InvalidArgument, innermost(err), "%v", err)
		last := all[len(all)-1].Event.Position.Commit + 1<<20
		s = t.followAll(esdb.SubscribeToAllOptions{From: esdb.Position{Commit: last, Prepare: last}})
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		t.append("large", esdb.NoStream{}, 0, event(strings.Repeat("x", 1<<20)))
		t.append("after", esdb.NoStream{}, 0, event(`{}`))
		require.Equal(t, []string{"after:0"}, t.heard(s, 1), "what lies before the position does not come")
	})
}

func TestPoint53_AMissingStreamIsWaitedFor(t *testing.T) {
	both(t, func(t *kit) {
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		t.append("b", esdb.NoStream{}, 0, event(`{}`))
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		require.Equal(t, []string{"a:0", "a:1"}, t.heard(s, 2))
		t.delete("a", esdb.Any{})
		t.append("a", esdb.NoStream{}, 2, event(`{}`))
		require.Equal(t, []string{"a:2"}, t.heard(s, 1))
	})
}

// Events are written all the time while subscriptions begin.
func TestPoint54_HistoryThenLive(t *testing.T) {
	both(t, func(t *kit) {
		const n = 2000
		t.append("a", esdb.NoStream{}, 999, events(1000)...)
		var wait sync.WaitGroup
		wait.Go(func() {
			for i := 1000; i < n; i += 10 {
				if _, err := t.try("a", esdb.Revision(uint64(i-1)), events(10)...); err != nil {
					t.Errorf("append %d: %v", i, err)
					return
				}
			}
		})
		for range 4 {
			wait.Go(func() {
				s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
				for i := range uint64(n) {
					if got := t.next(s).Event.EventNumber; got != i {
						t.Errorf("got %d, not %d", got, i)
						return
					}
				}
			})
			wait.Go(func() {
				s := t.followAll(esdb.SubscribeToAllOptions{From: esdb.Start{}})
				for i := uint64(0); i < n; {
					e := t.next(s).Event
					if e.StreamID != "a" {
						continue
					}
					if e.EventNumber != i {
						t.Errorf("$all: got %d, not %d", e.EventNumber, i)
						return
					}
					i++
				}
			})
		}
		wait.Wait()
	})
}

func TestPoint55_CaughtUpComesOnce(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, []string{"a:0", "C"}, t.heard(s, 2))
		t.append("a", esdb.Any{}, 2, events(2)...)
		require.Equal(t, []string{"a:1", "a:2"}, t.heard(s, 2))
	})
}

func TestPoint56_FellBehindAndTooSlow(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		all := t.followAll(esdb.SubscribeToAllOptions{From: esdb.End{}})
		require.Equal(t, []string{"a:0", "C"}, t.heard(s, 2))
		require.Equal(t, []string{"C"}, t.heard(all, 1))
		t.server.FallBehind()
		require.Equal(t, []string{"B", "C"}, t.heard(s, 2))
		require.Equal(t, []string{"B", "C"}, t.heard(all, 2))
		t.server.EndSubscriptions()
		require.Equal(t, []string{"D Aborted"}, t.heard(s, 1))
		require.Equal(t, []string{"D Aborted"}, t.heard(all, 1))
		t.append("a", esdb.Any{}, 1, event(`{}`))
		s = t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Revision(0)})
		require.Equal(t, []string{"a:1", "C"}, t.heard(s, 2))
	})
}

func TestPoint57_ATombstoneEndsASubscription(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 1, events(2)...)
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, []string{"a:0", "a:1", "C"}, t.heard(s, 3))
		t.tombstone("a", esdb.Any{})
		require.Equal(t, []string{"D FailedPrecondition"}, t.heard(s, 1))
		_, err := t.client.SubscribeToStream(t.ctx, "a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		t.isError(esdb.ErrorCodeStreamDeleted, err)
	})
}

func TestPoint58_SubscriptionsAreIndependent(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		one := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		two := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.NotEqual(t, one.Id(), two.Id())
		require.Equal(t, []string{"a:0", "C"}, t.heard(one, 2))
		require.NoError(t, one.Close())
		t.append("a", esdb.Any{}, 1, event(`{}`))
		require.Equal(t, []string{"a:0", "C", "a:1"}, t.heard(two, 3))
	})
}

func TestPoint59_CheckpointsOfFilteredAll(t *testing.T) {
	both(t, func(t *kit) {
		t.append("other-1", esdb.NoStream{}, 9, events(10)...)
		t.append("mine-1", esdb.NoStream{}, 0, event(`{}`))
		t.append("other-1", esdb.Any{}, 14, events(5)...)
		filter := &esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Prefixes: []string{"mine-"}}
		o := esdb.SubscribeToAllOptions{From: esdb.Start{}, Filter: filter, MaxSearchWindow: 2, CheckpointInterval: 3}
		all := t.readAll(esdb.ReadAllOptions{}, most)

		// Three system events, 10, one of mine, 5: a checkpoint after every 6.
		require.Len(t, all, 19)
		s := t.followAll(o)
		require.Equal(t, all[5].Event.Position, *s.Recv().CheckPointReached)
		require.Equal(t, all[11].Event.Position, *s.Recv().CheckPointReached)
		require.Equal(t, []string{"mine-1:0"}, t.heard(s, 1))
		require.Equal(t, all[17].Event.Position, *s.Recv().CheckPointReached)
		require.Equal(t, []string{"C"}, t.heard(s, 1))

		// One is left over, 5 more make it due, though nothing matches.
		t.append("other-2", esdb.NoStream{}, 3, events(4)...)
		due := t.append("other-2", esdb.Any{}, 4, event(`{}`)).CommitPosition
		t.append("mine-2", esdb.NoStream{}, 0, event(`{}`))
		require.Equal(t, due, s.Recv().CheckPointReached.Commit)
		require.Equal(t, []string{"mine-2:0"}, t.heard(s, 1))

		// Going on from each checkpoint skips nothing, and repeats nothing.
		for i, want := range map[int][]string{5: {"mine-1:0", "mine-2:0"}, 11: {"mine-1:0", "mine-2:0"}, 17: {"mine-2:0"}} {
			o.From = all[i].Event.Position
			s := t.followAll(o)
			for _, w := range want {
				e := t.next(s).Event
				require.Equal(t, w, e.StreamID+":"+strconv.FormatUint(e.EventNumber, 10))
			}
			require.NoError(t, s.Close())
		}

		// At the end of history there is none, even when it is due.
		o.From, o.MaxSearchWindow, o.CheckpointInterval = esdb.Start{}, 1, len(t.readAll(esdb.ReadAllOptions{}, most))
		s = t.followAll(o)
		require.Equal(t, []string{"mine-1:0", "mine-2:0", "C"}, t.heard(s, 3))
		due = t.append("other-2", esdb.Any{}, 5, event(`{}`)).CommitPosition
		require.Equal(t, due, s.Recv().CheckPointReached.Commit, "it comes with the next event")

		call, err := streams.NewStreamsClient(t.dial()).Read(t.ctx, &streams.ReadReq{Options: &streams.ReadReq_Options{
			StreamOption: &streams.ReadReq_Options_All{All: &streams.ReadReq_Options_AllOptions{AllOption: &streams.ReadReq_Options_AllOptions_Start{Start: &shared.Empty{}}}},
			CountOption:  &streams.ReadReq_Options_Subscription{Subscription: &streams.ReadReq_Options_SubscriptionOptions{}},
			FilterOption: &streams.ReadReq_Options_Filter{Filter: &streams.ReadReq_Options_FilterOptions{
				Filter: &streams.ReadReq_Options_FilterOptions_EventType{EventType: &streams.ReadReq_Options_FilterOptions_Expression{Prefix: []string{"a"}}},
				Window: &streams.ReadReq_Options_FilterOptions_Max{Max: 32},
			}},
		}})
		require.NoError(t, err)
		_, err = call.Recv()
		require.Equal(t, codes.InvalidArgument, status.Code(err), "an interval of 0: %v", err)
	})
}

func TestPoint60_Filters(t *testing.T) {
	both(t, func(t *kit) {
		t.append("cat-1", esdb.NoStream{}, 1, events(2)...)
		t.append("category-1", esdb.NoStream{}, 0, event(`{}`))
		typed := event(`{}`)
		typed.EventType = "typed"
		t.append("dog-1", esdb.NoStream{}, 0, typed)
		t.append("links", esdb.NoStream{}, 0, link(0, "dog-1"))
		t.append("end", esdb.NoStream{}, 0, esdb.EventData{EventType: "typed.end", Data: []byte("x")})
		for name, c := range map[string]struct {
			filter *esdb.SubscriptionFilter
			want   []string
		}{
			"stream prefix": {&esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Prefixes: []string{"cat-", "end"}}, []string{"cat-1:0", "cat-1:1", "end:0"}},
			"stream regex":  {&esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Regex: `^(cat|dog)-|end`}, []string{"cat-1:0", "cat-1:1", "dog-1:0", "end:0"}},
			"type prefix":   {&esdb.SubscriptionFilter{Type: esdb.EventFilterType, Prefixes: []string{"typed"}}, []string{"dog-1:0", "end:0"}},
			"type regex":    {&esdb.SubscriptionFilter{Type: esdb.EventFilterType, Regex: `^\$>$|end$`}, []string{"links:0", "end:0"}},
			"no system":     {esdb.ExcludeSystemEventsFilter(), []string{"cat-1:0", "cat-1:1", "category-1:0", "dog-1:0", "end:0"}},
		} {
			s := t.followAll(esdb.SubscribeToAllOptions{From: esdb.Start{}, Filter: c.filter, ResolveLinkTos: true, MaxSearchWindow: 1000, CheckpointInterval: 1})
			require.Equal(t, append(c.want, "C"), t.heard(s, len(c.want)+1), name)
		}
		_, err := t.client.SubscribeToAll(t.ctx, esdb.SubscribeToAllOptions{Filter: &esdb.SubscriptionFilter{Type: esdb.StreamFilterType, Regex: "("}})
		require.Equal(t, codes.InvalidArgument, innermost(err), "%v", err)
	})
}

func TestPoint61_ClosingEndsASubscription(t *testing.T) {
	both(t, func(t *kit) {
		ctx, cancel := context.WithCancel(t.ctx)
		s, err := t.client.SubscribeToStream(ctx, "a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.NoError(t, err)
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		cancel()
		require.Equal(t, []string{"D Canceled"}, t.heard(s, 1))
	})
}

func TestPoint67_AfterARestart(t *testing.T) {
	both(t, func(t *kit) {
		written := t.append("a", esdb.NoStream{}, 1, events(2)...)
		before := t.readAll(esdb.ReadAllOptions{}, most)
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		all := t.followAll(esdb.SubscribeToAllOptions{From: esdb.End{}})
		require.Equal(t, []string{"a:0", "a:1", "C"}, t.heard(s, 3))
		require.Equal(t, []string{"C"}, t.heard(all, 1))
		url := t.server.URL()
		require.NoError(t, t.server.Restart())
		require.Equal(t, url, t.server.URL())
		require.Equal(t, []string{"D Unavailable"}, t.heard(s, 1))
		require.Equal(t, []string{"D Unavailable"}, t.heard(all, 1))
		t.client = t.connect()
		after := t.readAll(esdb.ReadAllOptions{}, most)
		require.Equal(t, len(before), len(after))
		for i := range before {
			require.Equal(t, before[i].Event, after[i].Event)
		}
		require.Greater(t, t.append("a", esdb.Revision(1), 2, event(`{}`)).CommitPosition, written.CommitPosition)
		all = t.followAll(esdb.SubscribeToAllOptions{From: esdb.Position{Commit: written.CommitPosition, Prepare: written.PreparePosition}})
		require.Equal(t, []string{"a:2", "C"}, t.heard(all, 2))
	})
}

func TestPoint68_WhileTheServerIsDown(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.server.Down()
		t.server.Down()
		_, err := t.try("a", esdb.Any{}, event(`{}`))
		require.Error(t, err) // Unavailable, or only EOF when the client was about to send
		require.NoError(t, t.server.Up())
		require.NoError(t, t.server.Up())
		t.client = t.connect()
		t.append("a", esdb.Revision(0), 1, event(`{}`))
		require.NoError(t, t.server.Close())
		require.NoError(t, t.server.Close())
		require.ErrorContains(t, t.server.Up(), "it was closed")
	})
}

func TestDropAndRefuseConnections(t *testing.T) {
	both(t, func(t *kit) {
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		t.server.DropConnections()
		require.Equal(t, []string{"D Unavailable"}, t.heard(s, 1))
		t.client = t.connect()
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.server.RefuseConnections(true)
		_, err := t.try("a", esdb.Any{}, event(`{}`))
		require.Error(t, err) // Unavailable, or only EOF when the client was about to send
		t.server.RefuseConnections(false)
		t.client = t.connect()
		t.append("a", esdb.Revision(0), 1, event(`{}`))
	})
}

func TestDelay(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.server.Delay(time.Hour)
		ctx, cancel := context.WithTimeout(t.ctx, 2*time.Second) // it must get there
		defer cancel()
		_, err := t.client.AppendToStream(ctx, "a", esdb.AppendToStreamOptions{ExpectedRevision: esdb.Revision(0)}, event(`{}`))
		t.isError(esdb.ErrorCodeDeadlineExceeded, err)
		t.server.Delay(time.Millisecond)
		require.Equal(t, []uint64{0, 1}, t.revisions("a", forward, most), "it was written, the answer was late")
	})
}

// Two servers over one store stand for two nodes of a cluster.
func TestNotLeader(t *testing.T) {
	both(t, func(t *kit) {
		leader, err := esdbserver.Start(t.store)
		require.NoError(t, err)
		defer leader.Close()
		members := []esdbserver.Member{{Address: t.server.Address(), Alive: true}, {Address: leader.Address(), Leader: true, Alive: true}}
		t.server.Cluster(members...)
		leader.Cluster(members...)
		host, port, found := strings.Cut(leader.Address(), ":")
		require.True(t, found)
		number, err := strconv.Atoi(port)
		require.NoError(t, err)
		t.server.FollowLeader(host, number)

		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, []string{"C"}, t.heard(s, 1))
		t.refused(esdb.ErrorCodeNotLeader, "a", esdb.Any{}, event(`{}`))
		t.append("a", esdb.NoStream{}, 0, event(`{}`)) // the client went to the leader
		for _, refused := range []func(*esdb.Client) error{
			func(c *esdb.Client) error {
				_, err := c.DeleteStream(t.ctx, "a", esdb.DeleteStreamOptions{})
				return err
			},
			func(c *esdb.Client) error {
				_, err := c.TombstoneStream(t.ctx, "a", esdb.TombstoneStreamOptions{})
				return err
			},
		} {
			follower := t.connect()
			t.isError(esdb.ErrorCodeNotLeader, refused(follower))
			_, err := follower.GetServerVersion() // it is with the leader now: closed before, it would leak a connection
			require.NoError(t, err)
		}

		// What the leader wrote, the follower has.
		follower := t.connect()
		s, err = follower.SubscribeToStream(t.ctx, "a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.NoError(t, err)
		defer s.Close()
		require.Equal(t, "a", t.next(s).Event.StreamID)

		// Gossip leads to the leader.
		settings, err := esdb.ParseConnectionString("esdb+discover://" + t.server.Address() + "?tls=false")
		require.NoError(t, err)
		settings.Logger = esdb.NoopLogging()
		discovering, err := esdb.NewClient(settings)
		require.NoError(t, err)
		defer discovering.Close()
		_, err = discovering.AppendToStream(t.ctx, "a", esdb.AppendToStreamOptions{ExpectedRevision: esdb.Revision(0)}, event(`{}`))
		require.NoError(t, err)
		t.server.FollowLeader("", 0)
		t.client = t.connect()
		t.append("a", esdb.Revision(1), 2, event(`{}`))
	})
}

func TestServerVersion(t *testing.T) {
	both(t, func(t *kit) {
		v, err := t.client.GetServerVersion()
		require.NoError(t, err)
		require.Equal(t, esdb.ServerVersion{Major: 23, Minor: 10, Patch: 6}, *v)
		settings, err := esdb.ParseConnectionString("esdb+discover://" + t.server.Address() + "?tls=false")
		require.NoError(t, err)
		settings.Logger = esdb.NoopLogging()
		client, err := esdb.NewClient(settings)
		require.NoError(t, err)
		defer client.Close()
		_, err = client.GetServerVersion()
		require.NoError(t, err)
	})
}

// Writers on two servers over one store take turns.
func TestTwoServersOverOneStore(t *testing.T) {
	both(t, func(t *kit) {
		other, err := esdbserver.Start(t.store)
		require.NoError(t, err)
		defer other.Close()
		settings, err := esdb.ParseConnectionString(other.URL())
		require.NoError(t, err)
		settings.Logger = esdb.NoopLogging()
		second, err := esdb.NewClient(settings)
		require.NoError(t, err)
		defer second.Close()
		const each = 50
		var wait sync.WaitGroup
		for _, client := range []*esdb.Client{t.client, second} {
			for range 4 {
				wait.Go(func() {
					for range each {
						if _, err := client.AppendToStream(t.ctx, "a", esdb.AppendToStreamOptions{}, event(`{}`)); err != nil {
							t.Errorf("append: %v", err)
							return
						}
					}
				})
			}
		}
		// Each learns a moment later what was written through the other one.
		for _, client := range []*esdb.Client{t.client, second} {
			s, err := client.SubscribeToStream(t.ctx, "a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
			require.NoError(t, err)
			defer s.Close()
			for i := range uint64(8 * each) {
				require.Equal(t, i, t.next(s).Event.EventNumber)
			}
		}
		wait.Wait()
		first := t.readAll(esdb.ReadAllOptions{}, most)
		again, err := collect(second.ReadAll(t.ctx, esdb.ReadAllOptions{}, most))
		require.NoError(t, err)
		require.Equal(t, len(first), len(again))
		for i := range first {
			require.Equal(t, first[i].Event, again[i].Event)
		}
	})
}

func TestReadsThatAskForTheLeader(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.server.FollowLeader("127.0.0.1", 2113)
		require.Equal(t, []uint64{0}, t.revisions("a", forward, most))
		ctx := metadata.AppendToOutgoingContext(t.ctx, "requires-leader", "true")
		call, err := streams.NewStreamsClient(t.dial()).Read(ctx, &streams.ReadReq{})
		require.NoError(t, err)
		_, err = call.Recv()
		require.Equal(t, codes.NotFound, status.Code(err))
		require.Equal(t, []string{"not-leader"}, call.Trailer().Get("exception"))
		require.Equal(t, []string{"2113"}, call.Trailer().Get("leader-endpoint-port"))
	})
}

// A port that is down refuses, and nobody else gets it: without a reservation a
// client that keeps dialling can end up connected to itself.
func TestDownKeepsThePort(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux lets a port be kept without listening on it")
	}
	both(t, func(t *kit) {
		t.server.Down()
		for range 1000 {
			conn, err := net.Dial("tcp", t.server.Address())
			if err == nil {
				conn.Close()
			}
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
		}
		require.NoError(t, t.server.Up())
		t.client = t.connect()
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
	})
}
