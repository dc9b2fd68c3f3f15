package nats

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	client "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed/internal/metatest"
	"github.com/deed-go/deed/internal/natsserver"
)

func TestMain(m *testing.M) {
	metatest.AtOnce("4")
	goleak.VerifyTestMain(runner{m})
}

// runner stops the servers that tests share before goroutines are counted.
type runner struct{ m *testing.M }

func (r runner) Run() int {
	defer shared.close()
	return r.m.Run()
}

// shared are servers, one and a cluster of three, for tests that do not break
// them. They sync every write, as they should be set up.
var shared sharedServers

type sharedServers struct {
	mu       sync.Mutex
	clusters map[int]*natsserver.Cluster
}

func (s *sharedServers) get(t testing.TB, nodes int) *natsserver.Cluster {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.clusters[nodes]; c != nil {
		return c
	}
	c, err := natsserver.Start(natsserver.Options{Nodes: nodes, SyncAlways: true})
	require.NoError(t, err)
	if s.clusters == nil {
		s.clusters = map[int]*natsserver.Cluster{}
	}
	s.clusters[nodes] = c
	return c
}

func (s *sharedServers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clusters {
		c.Close()
	}
}

// replicated runs the test on a stream of one server and on one of three.
func replicated(t *testing.T, run func(t *testing.T, c *natsserver.Cluster)) {
	t.Helper()
	for _, nodes := range []int{1, 3} {
		t.Run(fmt.Sprintf("R%d", nodes), func(t *testing.T) {
			t.Parallel()
			run(t, shared.get(t, nodes))
		})
	}
}

// open opens a new log, closed when the test ends, and returns its name.
func openLog(t testing.TB, c *natsserver.Cluster, options ...Option) (*Store, string) {
	t.Helper()
	name := newName()
	s := reopenLog(t, c, name, options...)
	return s, name
}

// Another process may run these tests at the same time, and get a port that a
// server here had.
func newName() string { return fmt.Sprint("test-", os.Getpid(), "-", streams.Add(1)) }

func reopenLog(t testing.TB, c *natsserver.Cluster, name string, options ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), c.URL(), append([]Option{Stream(name), Replicas(c.Nodes()), quiet(), opening}, options...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// opening lets a store open on a busy machine that has little patience afterwards.
func opening(s *settings) error {
	s.opening = time.Minute
	return nil
}

// raw is a stream as the store makes it, without the store.
type raw struct {
	t    *testing.T
	ctx  context.Context
	conn *client.Conn
	js   jetstream.JetStream
	name string
}

func newRaw(t *testing.T, c *natsserver.Cluster) *raw {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	conn, err := c.Connect()
	require.NoError(t, err)
	t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	r := &raw{t: t, ctx: ctx, conn: conn, js: js, name: newName()}
	s, err := js.CreateStream(ctx, Config(r.name, c.Nodes(), "x"))
	require.NoError(t, err)
	require.True(t, s.CachedInfo().Config.AllowAtomicPublish)
	return r
}

// message returns one for the subject below the stream's name, with headers in pairs.
func (r *raw) message(subject string, headers ...string) *client.Msg {
	m := client.NewMsg(r.name + "." + subject)
	for i := 0; i < len(headers); i += 2 {
		m.Header[headers[i]] = []string{headers[i+1]}
	}
	return m
}

type answer struct {
	Error    *jetstream.APIError `json:"error"`
	Sequence uint64              `json:"seq"`
	Count    int                 `json:"count"`
}
