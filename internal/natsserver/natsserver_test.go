package natsserver_test

import (
	"context"
	"net"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/freeport"
	"github.com/deed-go/deed/internal/natsserver"
)

func stream(t *testing.T, ctx context.Context, c *natsserver.Cluster, replicas int) jetstream.JetStream {
	t.Helper()
	nc, err := c.Connect()
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	_, err = js.CreateStream(ctx, jetstream.StreamConfig{Name: "x", Subjects: []string{"x.>"}, Replicas: replicas, AllowAtomicPublish: true})
	require.NoError(t, err)
	return js
}

func TestOne(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := natsserver.Start(natsserver.Options{SyncAlways: true})
	require.NoError(t, err)
	defer c.Close()
	js := stream(t, ctx, c, 1)
	_, err = js.Publish(ctx, "x.y", []byte("z"))
	require.NoError(t, err)
	c.Stop(0)
	require.NoError(t, c.Start(0))
	require.NoError(t, c.Settled(ctx, "x"))
	require.Eventually(t, func() bool {
		// A request that is lost with the old connection has no answer.
		once, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		s, err := js.Stream(once, "x")
		return err == nil && s.CachedInfo().State.LastSeq == 1
	}, 30*time.Second, 10*time.Millisecond, "it is still there")
}

// A node that was cut off follows nothing until it is let in again.
func TestCluster_CutOff(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := natsserver.Start(natsserver.Options{Nodes: 3})
	require.NoError(t, err)
	defer c.Close()
	js := stream(t, ctx, c, 3)
	require.NoError(t, c.Settled(ctx, "x"))
	leader := c.Leader("x")
	require.GreaterOrEqual(t, leader, 0)
	publish := func() {
		require.Eventually(t, func() bool {
			once, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := js.Publish(once, "x.y", []byte("z"))
			return err == nil
		}, 50*time.Second, 10*time.Millisecond)
	}
	publish()
	c.CutOff(leader)
	began := time.Now()
	require.Eventually(t, func() bool {
		now := c.Leaders("x") > 1
		for i := range 3 {
			now = now || i != leader && c.Leader("x") == i
		}
		return now
	}, 40*time.Second, time.Millisecond, "another node takes over")
	t.Logf("another leader after %s, then %d believe to lead", time.Since(began), c.Leaders("x"))
	c.Rejoin(leader)
	require.NoError(t, c.Settled(ctx, "x"))
	require.Equal(t, 1, c.Leaders("x"), "the one that was cut off knows that it does not lead")
	publish()
	require.NoError(t, c.Settled(ctx, "x"))
	require.NoError(t, c.StepDown("x"))
	publish()
}

// A port may be taken by another process between being found and being used, and
// while the node is down.
func TestStart_PortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = taken.Close() }()
	tries, refused := 0, make(chan struct{}, 100)
	c, err := natsserver.Start(natsserver.WithPorts(natsserver.Options{}, func() (int, error) {
		if tries++; tries == 1 {
			return taken.Addr().(*net.TCPAddr).Port, nil
		}
		return freeport.Find()
	}, func() { refused <- struct{}{} }))
	require.NoError(t, err)
	defer c.Close()
	require.Equal(t, 2, tries)
	<-refused

	c.Stop(0)
	at, err := url.Parse(c.URL())
	require.NoError(t, err)
	other, err := net.Listen("tcp", at.Host)
	require.NoError(t, err)
	go func() {
		<-refused
		_ = other.Close()
	}()
	require.NoError(t, c.Start(0))
	require.Equal(t, "nats://"+at.Host, c.URL(), "it is where its clients look for it")
}

// Nothing but another server can take the port of a node that is down: its
// clients find it where it was.
func TestCluster_Ports(t *testing.T) {
	c, err := natsserver.Start(natsserver.Options{Nodes: 3})
	require.NoError(t, err)
	defer c.Close()
	for i := range 3 {
		before := c.NodeURL(i)
		at, err := url.Parse(before)
		require.NoError(t, err)
		port, err := strconv.Atoi(at.Port())
		require.NoError(t, err)
		require.Less(t, port, 32000, "those from 32768 on are given to outgoing connections")
		c.Stop(i)
		require.NoError(t, c.Start(i))
		require.Equal(t, before, c.NodeURL(i))
	}
}
