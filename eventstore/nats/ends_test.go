package nats

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// The messages of a commit of two new streams are late. They arrive
// while the store looks where the streams are, after it has seen the first one
// and before it sees the second: the commit is told that it lost to itself.
func TestOutcome_ConflictWithItself(t *testing.T) {
	t.Parallel()
	c := shared.get(t, 1)
	ann, bob := account("ann"), account("bob")
	var mu sync.Mutex
	var late []*client.Msg
	swallowed, delivered := once(), once()
	annRead := make(chan struct{}, 100)
	var store *Store
	store, _ = openLog(t, c, hooked(func(s *settings) {
		s.swallow = func(messages []*client.Msg) bool {
			if len(messages) < 2 || !swallowed() {
				return false
			}
			mu.Lock()
			defer mu.Unlock()
			for _, m := range messages {
				h := client.Header{}
				for k, v := range m.Header {
					h[k] = v
				}
				late = append(late, &client.Msg{Subject: m.Subject, Header: h, Data: m.Data})
			}
			return true
		}
		s.stale = func(r *getRequest) bool {
			mu.Lock()
			messages := late
			mu.Unlock()
			switch {
			case len(messages) == 0:
			case r.Last == subjects{s.stream}.of(ann):
				annRead <- struct{}{}
			case r.Last == subjects{s.stream}.of(bob):
				<-annRead
				time.Sleep(200 * time.Millisecond) // until it has been answered
				if delivered() {
					for i, m := range messages {
						if i < len(messages)-1 {
							_ = store.conn.PublishMsg(m)
							continue
						}
						got, err := store.conn.RequestMsgWithContext(t.Context(), m)
						if err != nil {
							t.Error(err)
							continue
						}
						t.Logf("the late messages arrive: %s", got.Data)
					}
				}
			}
			return false
		}
	}))
	_, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("eve"), 1)})
	require.NoError(t, err)
	commit := eventstore.Commit{
		Events:     append(happened(ann, 1), happened(bob, 1)...),
		Conditions: []eventstore.Condition{eventstore.StreamAt(bob, eventstore.Revision{})},
	}
	_, err = store.Append(t.Context(), commit)
	t.Logf("events in the log: %d", len(read(t, store, eventstore.All(), eventstore.ReadOptions{})))
	require.NoError(t, err, "it was written")
}

// TestEnds_ManyLarge: where the last events of many streams are together larger
// than what one answer of the server holds, none of them is taken for a new one.
func TestEnds_ManyLarge(t *testing.T) {
	c := servers(t, 1)
	name := newName()
	writer := reopenLog(t, c, name)
	data := bytes.Repeat([]byte{'x'}, 900<<10)
	data[0], data[len(data)-1] = '"', '"'
	const n = 90 // 79 MiB; the server ends an answer at 64
	for i := range n {
		_, err := writer.Append(t.Context(), eventstore.Commit{Events: []eventstore.Event{{Stream: account(fmt.Sprint(i)), Type: "large", Data: data}}})
		require.NoError(t, err)
	}
	var streams []eventstore.Stream
	for i := range n {
		streams = append(streams, account(fmt.Sprint(i)))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	found, err := writer.lasts(ctx, append(streams, account("nobody")), true)
	require.NoError(t, err)
	for i, m := range found[:n] {
		require.NotNil(t, m, streams[i])
		require.Equal(t, uint64(1), m.Version)
	}
	require.Nil(t, found[n])

	var open atomic.Bool
	store := reopenLog(t, c, name, hooked(func(s *settings) {
		s.hold = func() bool { return !open.Load() }
		s.attempt = 20 * time.Second // under the race detector megabytes take long
	}))
	var pending []*eventstore.Pending
	for i := range n {
		of := account(fmt.Sprint(i))
		pending = append(pending, store.Enqueue(t.Context(), eventstore.Commit{Events: happened(of, 1), Conditions: []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{Version: 1})}}))
	}
	open.Store(true)
	store.scheduler.signal()
	for _, p := range pending {
		_, err := p.Result()
		require.NoError(t, err, "nobody else writes")
	}
}

// A new leader says of a replica that it has never heard from since it
// was elected that it was active 0 ago; leads takes that for just now.
func TestYesterday_LeadsWithoutEverybody(t *testing.T) {
	long(t)
	t.Parallel()
	c := servers(t, 3)
	name := newName()
	maker := reopenLog(t, c, name)
	_, err := maker.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	require.NoError(t, c.Settled(t.Context(), name))
	yesterday := c.Leader(name)
	store, err := Open(t.Context(), c.NodeURL((yesterday+1)%3), Stream(name), quiet(), hooked(func(s *settings) { s.attempt = time.Second }))
	require.NoError(t, err)
	defer store.Close()
	c.CutOff(yesterday)
	defer c.Rejoin(yesterday)
	r, err := store.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	cut := time.Now()
	behind, err := Open(t.Context(), c.NodeURL(yesterday), Stream(name), quiet(), opening, Patience(time.Second), hooked(func(s *settings) { s.attempt = time.Second }))
	if err == nil {
		defer behind.Close()
	}
	both := 0
	for time.Since(cut) < 8*time.Second {
		believes := false
		if behind != nil {
			info, err := behind.ask(t.Context())
			believes = err == nil && info.Cluster != nil && info.Cluster.Leader == fmt.Sprintf("node-%d", yesterday)
		}
		leads := store.leads(t.Context(), uint64(r.Last))
		info, err := store.ask(t.Context())
		if err == nil && info.Cluster != nil {
			for _, p := range info.Cluster.Replicas {
				if p.Name == fmt.Sprintf("node-%d", yesterday) {
					t.Logf("%s: leader %s: %s current=%v offline=%v active=%s; yesterday's takes itself for the leader: %v; leads says %v",
						time.Since(cut).Round(100*time.Millisecond), info.Cluster.Leader, p.Name, p.Current, p.Offline, p.Active, believes, leads)
				}
			}
		}
		if leads {
			both++
		}
		time.Sleep(500 * time.Millisecond)
	}
	require.Zero(t, both, "a server was cut off, and leads says that all have just been heard from")
}

// The connection is lost between leads and the question,
// and made anew to the server that was cut off. An event is skipped, in silence.
func TestYesterday_ScanAfterReconnect(t *testing.T) {
	t.Parallel()
	c := servers(t, 3)
	name := newName()
	maker := reopenLog(t, c, name)
	first, err := maker.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	require.NoError(t, c.Settled(t.Context(), name))
	yesterday := c.Leader(name)
	near := (yesterday + 1) % 3
	writer, err := Open(t.Context(), c.NodeURL((yesterday+2)%3), Stream(name), quiet(), Patience(time.Minute), hooked(func(s *settings) { s.attempt = time.Second }))
	require.NoError(t, err)
	defer writer.Close()
	conn, err := client.Connect(c.NodeURL(near)+","+c.NodeURL(yesterday), client.DontRandomize(), client.IgnoreDiscoveredServers(), client.MaxReconnects(-1), client.ReconnectWait(20*time.Millisecond), client.ReconnectBufSize(-1))
	require.NoError(t, err)
	defer conn.Close()
	stop := once()
	var store *Store
	store, err = OpenConn(t.Context(), conn, Stream(name), quiet(), Patience(time.Minute), hooked(func(s *settings) {
		s.attempt = time.Second
		s.stale = func(r *getRequest) bool {
			if r.Next == "" {
				return false
			}
			if r.Batch > 0 {
				return true // a replica that lags knows of nothing behind the first event
			}
			if stop() { // leads has said that there can be no leader of yesterday
				c.Stop(near)
			}
			return false
		}
	}))
	require.NoError(t, err)
	defer store.Close()
	c.CutOff(yesterday)
	_, err = writer.Append(t.Context(), eventstore.Commit{Events: happened(eventstore.Stream{Category: "other", ID: "x"}, pageEvents+100)})
	require.NoError(t, err)
	last, err := writer.Append(t.Context(), eventstore.Commit{Events: happened(account("ann"), 1)})
	require.NoError(t, err)
	events, reached, err := store.scanner(eventstore.OneCategory("account")).next(t.Context(), first.Last, last.Last)
	t.Logf("%d events, through %d of %d, %v; connected to %s, cut off is %s", len(events), reached, last.Last, err, conn.ConnectedUrl(), c.NodeURL(yesterday))
	require.NoError(t, err)
	require.True(t, len(events) == 1 || reached < last.Last, "an event was skipped")
}
