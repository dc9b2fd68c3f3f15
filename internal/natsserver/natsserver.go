// Package natsserver runs NATS servers with JetStream inside the process: one,
// or a cluster of several on the loopback interface, whose nodes can be
// stopped, started again and cut off from each other.
//
// It imports nothing of deed but internal/freeport. Tests use it, and programs
// that keep their log in an embedded server.
package natsserver

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/deed-go/deed/internal/freeport"
)

// Options say what to start. The zero value is one server with a directory of
// its own that Close removes.
type Options struct {
	// Nodes is the number of servers; 1 by default. A cluster needs 3 to survive
	// the loss of one.
	Nodes int
	// Directory holds the JetStream files, a folder for each node when there are
	// several. Empty means a temporary one, which Close removes.
	Directory string
	// SyncAlways makes the servers sync every write to disk before they
	// acknowledge it. Without it they sync every two minutes, and lose what they
	// acknowledged since when the power fails.
	SyncAlways bool
	// MaxPayload is the largest message in bytes; 2 MiB by default, so that events
	// of 1 MiB fit with their headers.
	MaxPayload int32
	// Patience is how long starting may take; 30 seconds by default.
	Patience time.Duration

	find    func() (int, error) // a port
	refused func()              // is called when a port is taken
}

// System is the user of the system account, whose password is the same: it may
// ask for the servers' settings. The servers listen on the loopback interface
// only.
const System = "system"

// Cluster is one server or several. All methods may be called concurrently.
type Cluster struct {
	options   Options
	name      string // nodes of another cluster, of another process perhaps, are refused
	temporary bool

	mu     sync.Mutex
	nodes  []*node
	closed bool
}

type node struct {
	name       string
	directory  string
	clientPort int // the same after a restart
	began      bool
	running    *server.Server
	gate       *gate // other nodes reach this one through it
}

// Start runs the servers and returns when JetStream is ready on all of them.
func Start(o Options) (*Cluster, error) {
	if o.Nodes == 0 {
		o.Nodes = 1
	}
	if o.Nodes < 1 || o.Nodes > 9 {
		return nil, fmt.Errorf("%d NATS servers: use 1 to 9", o.Nodes)
	}
	if o.MaxPayload == 0 {
		o.MaxPayload = 2 << 20
	}
	if o.Patience == 0 {
		o.Patience = 30 * time.Second
	}
	if o.find == nil {
		o.find = freeport.Find
	}
	c := &Cluster{options: o}
	if o.Directory == "" {
		directory, err := os.MkdirTemp("", "deed-nats-")
		if err != nil {
			return nil, fmt.Errorf("make a directory for NATS: %w", err)
		}
		c.options.Directory, c.temporary = directory, true
	}
	// The same one when it is started on the same files again.
	c.name = fmt.Sprintf("deed-%x", sha256.Sum256([]byte(c.options.Directory)))
	if err := c.start(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Cluster) start() error {
	for i := range c.options.Nodes {
		port, err := c.options.find()
		if err != nil {
			return err
		}
		n := &node{name: fmt.Sprintf("node-%d", i), directory: c.options.Directory, clientPort: port}
		if c.options.Nodes > 1 {
			n.directory = filepath.Join(c.options.Directory, n.name)
			if n.gate, err = newGate(n.name); err != nil {
				return err
			}
		}
		c.nodes = append(c.nodes, n)
	}
	for i := range c.nodes {
		if err := c.run(i); err != nil {
			return err
		}
	}
	return c.ready()
}

// errPort says that somebody else listens where the node should.
var errPort = errors.New("its port is taken")

// run starts a node that does not run. One whose port is taken gets another one
// when it starts first, and waits for it when it starts again.
func (c *Cluster) run(i int) error {
	n := c.nodes[i]
	for deadline := time.Now().Add(c.options.Patience); ; {
		err := c.attempt(i)
		if !errors.Is(err, errPort) || time.Now().After(deadline) {
			return err
		}
		if refused := c.options.refused; refused != nil {
			refused()
		}
		if n.began {
			time.Sleep(20 * time.Millisecond)
		} else if n.clientPort, err = c.options.find(); err != nil {
			return err
		}
	}
}

func (c *Cluster) attempt(i int) error {
	n := c.nodes[i]
	system := server.NewAccount("$SYS")
	o := &server.Options{
		ServerName: n.name, Host: "127.0.0.1", Port: n.clientPort, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: n.directory, SyncAlways: c.options.SyncAlways, MaxPayload: c.options.MaxPayload,
		// With users of the system account only, everybody else is let in without one.
		Accounts: []*server.Account{system}, SystemAccount: "$SYS",
		Users:                  []*server.User{{Username: System, Password: System, Account: system}},
		DisableJetStreamBanner: true,
	}
	if c.options.Nodes > 1 {
		o.Cluster = server.ClusterOpts{
			Name: c.name, Host: "127.0.0.1", Port: server.RANDOM_PORT, Advertise: n.gate.address(), PoolSize: -1,
			Compression: server.CompressionOpts{Mode: server.CompressionOff},
		}
		for j, other := range c.nodes {
			if j != i {
				o.Routes = append(o.Routes, &url.URL{Scheme: "nats-route", Host: other.gate.address()})
			}
		}
	}
	s, err := server.NewServer(o)
	if err != nil {
		return fmt.Errorf("start NATS server %s: %w", n.name, err)
	}
	var failure failure
	s.SetLogger(&failure, false, false)
	s.Start()
	err = failure.err()
	if err == nil && !s.ReadyForConnections(c.options.Patience) {
		err = fmt.Errorf("not within %s", c.options.Patience)
	}
	if err != nil {
		s.Shutdown()
		s.WaitForShutdown()
		return fmt.Errorf("start NATS server %s: %w", n.name, err)
	}
	n.began = true
	if n.gate != nil {
		n.gate.lead(s.ClusterAddr().String())
	}
	n.running = s
	return nil
}

// ready waits for JetStream on all nodes that run.
func (c *Cluster) ready() error {
	deadline := time.Now().Add(c.options.Patience)
	for {
		leader, current := c.options.Nodes == 1, true
		for _, n := range c.nodes {
			if n.running == nil {
				continue
			}
			if !n.running.JetStreamEnabled() || c.options.Nodes > 1 && !n.running.JetStreamIsCurrent() {
				current = false
			}
			leader = leader || n.running.JetStreamIsLeader() && len(n.running.JetStreamClusterPeers()) == c.options.Nodes
		}
		if leader && current {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("JetStream was not ready on %d NATS servers within %s", c.options.Nodes, c.options.Patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Nodes returns how many servers there are, running or not.
func (c *Cluster) Nodes() int { return c.options.Nodes }

// URL returns where clients connect: the addresses of all nodes, joined by
// commas.
func (c *Cluster) URL() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []string
	for i := range c.nodes {
		all = append(all, c.url(i, ""))
	}
	return strings.Join(all, ",")
}

// NodeURL returns where clients connect to one node.
func (c *Cluster) NodeURL(i int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.url(i, "")
}

// SystemURL is URL for the user of the system account, who may ask the servers
// for their settings.
func (c *Cluster) SystemURL() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []string
	for i := range c.nodes {
		all = append(all, c.url(i, System+":"+System+"@"))
	}
	return strings.Join(all, ",")
}

func (c *Cluster) url(i int, user string) string {
	return fmt.Sprintf("nats://%s127.0.0.1:%d", user, c.nodes[i].clientPort)
}

// Connect connects to any of the nodes, and goes on trying for ever when the
// connection is lost, unless the options say otherwise.
func (c *Cluster) Connect(options ...nats.Option) (*nats.Conn, error) {
	standard := []nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond), nats.ReconnectJitter(0, 0)}
	return nats.Connect(c.URL(), append(standard, options...)...)
}

// Stop shuts a node down. Whoever is connected to it is disconnected; what it
// has acknowledged is in its files. Stopping it again does nothing.
func (c *Cluster) Stop(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stop(i)
}

func (c *Cluster) stop(i int) {
	if s := c.nodes[i].running; s != nil {
		c.nodes[i].running = nil
		if g := c.nodes[i].gate; g != nil {
			g.lead("")
		}
		s.Shutdown()
		s.WaitForShutdown()
	}
}

// Start starts a node that was stopped, with the same address and files. It
// does not wait until the node has caught up. Starting it again does nothing.
func (c *Cluster) Start(i int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return errors.New("the NATS servers were closed")
	}
	if c.nodes[i].running != nil {
		return nil
	}
	return c.run(i)
}

// Running reports whether the node runs.
func (c *Cluster) Running(i int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nodes[i].running != nil
}

// CutOff parts a node from the others, as when the network between them fails:
// connections break, new ones are refused. Its clients stay connected to it.
func (c *Cluster) CutOff(i int) {
	for j, n := range c.nodes {
		if n.gate == nil {
			continue
		}
		if j == i {
			n.gate.shut("")
		} else {
			n.gate.shut(c.nodes[i].name)
		}
	}
}

// Rejoin ends what CutOff began.
func (c *Cluster) Rejoin(i int) {
	for j, n := range c.nodes {
		if n.gate == nil {
			continue
		}
		if j == i {
			n.gate.open("")
		} else {
			n.gate.open(c.nodes[i].name)
		}
	}
}

// Leader returns the node that leads the stream; -1 when there is none now.
// During a partition two nodes may believe to be it; the first one is returned.
func (c *Cluster) Leader(stream string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, n := range c.nodes {
		if n.leads(stream, c.options.Nodes) {
			return i
		}
	}
	return -1
}

// leads reports whether the node leads the stream; a lone server leads all.
func (n *node) leads(stream string, nodes int) bool {
	return n.running != nil && (nodes == 1 || n.running.JetStreamIsStreamLeader("$G", stream))
}

// Settled waits until the stream has one leader and all running nodes have all
// of it. A node that was cut off may believe for a while that it still leads.
func (c *Cluster) Settled(ctx context.Context, stream string) error {
	for {
		c.mu.Lock()
		leaders, current := 0, true
		for _, n := range c.nodes {
			if n.running == nil {
				continue
			}
			if n.leads(stream, c.options.Nodes) {
				leaders++
			}
			current = current && (c.options.Nodes == 1 || n.running.JetStreamIsStreamCurrent("$G", stream))
		}
		c.mu.Unlock()
		if leaders == 1 && current {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stream %q has no leader or several, or replicas that lag: %w", stream, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// StepDown makes the leader of the stream give up its place.
func (c *Cluster) StepDown(stream string) error {
	leader := c.Leader(stream)
	if leader < 0 {
		return fmt.Errorf("stream %q has no leader", stream)
	}
	c.mu.Lock()
	s := c.nodes[leader].running
	c.mu.Unlock()
	if s == nil {
		return fmt.Errorf("stream %q has no leader", stream)
	}
	return s.JetStreamStepdownStream("$G", stream)
}

// Close stops all nodes, and removes the directory if it was a temporary one.
// Closing again does nothing.
func (c *Cluster) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	var stopping sync.WaitGroup
	for i := range c.nodes {
		stopping.Go(func() { c.stop(i) })
	}
	stopping.Wait()
	for _, n := range c.nodes {
		if n.gate != nil {
			n.gate.close()
		}
	}
	if c.temporary {
		_ = os.RemoveAll(c.options.Directory)
	}
}
