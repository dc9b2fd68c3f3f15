package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	natsd "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// natsServers are one JetStream server, or a cluster, within this process. They
// sync every write before they acknowledge it.
type natsServers struct {
	nodes   int
	dir     string
	running []*natsd.Server
	conn    *nats.Conn
	js      jetstream.JetStream
	filled  string // the stream with stored events, once there is one
	made    int
}

func startNATS(parent string, nodes int) (_ *natsServers, err error) {
	dir, err := os.MkdirTemp(parent, "nats-")
	if err != nil {
		return nil, fmt.Errorf("start NATS: %w", err)
	}
	n := &natsServers{nodes: nodes, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start NATS: %w", err), n.stop())
		}
	}()
	routes := make([]*url.URL, nodes)
	for i := range routes {
		port, err := freePort(context.Background())
		if err != nil {
			return nil, err
		}
		routes[i] = &url.URL{Scheme: "nats-route", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))}
	}
	for i := range nodes {
		o := &natsd.Options{
			ServerName: fmt.Sprintf("node-%d", i), Host: "127.0.0.1", Port: natsd.RANDOM_PORT, NoSigs: true, NoLog: true,
			JetStream: true, StoreDir: filepath.Join(dir, strconv.Itoa(i)), SyncAlways: true, DisableJetStreamBanner: true,
		}
		if nodes > 1 {
			port, _ := strconv.Atoi(routes[i].Port())
			o.Cluster = natsd.ClusterOpts{Name: "bench", Host: "127.0.0.1", Port: port}
			o.Routes = routes
		}
		s, err := natsd.NewServer(o)
		if err != nil {
			return nil, err
		}
		n.running = append(n.running, s)
		s.Start()
		if !s.ReadyForConnections(10 * time.Second) {
			return nil, errors.New("it was not ready after 10 s")
		}
	}
	if n.conn, err = nats.Connect(n.url(), nats.MaxReconnects(-1)); err != nil {
		return nil, err
	}
	if n.js, err = jetstream.New(n.conn); err != nil {
		return nil, err
	}
	// A cluster takes a while until it makes streams.
	for deadline := time.Now().Add(30 * time.Second); ; {
		name, err := n.create("ready")
		if err == nil {
			return n, n.drop(name)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no stream could be made within 30 s: %w", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (n *natsServers) create(name string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := n.js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}, Replicas: n.nodes})
	return name, err
}

// url is that of all servers, so that clients spread over them.
func (n *natsServers) url() string {
	all := ""
	for i, s := range n.running {
		if i > 0 {
			all += ","
		}
		all += "nats://" + s.Addr().String()
	}
	return all
}

// log names a log that does not exist yet, and its DSN.
func (n *natsServers) log() (dsn, name string) {
	n.made++
	name = fmt.Sprintf("bench%d", n.made)
	return n.dsn(name), name
}

func (n *natsServers) dsn(name string) string {
	return fmt.Sprintf("%s/?stream=%s&replicas=%d", n.url(), name, n.nodes)
}

func (n *natsServers) drop(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := n.js.DeleteStream(ctx, name); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("delete stream %s: %w", name, err)
	}
	return nil
}

func (n *natsServers) stop() error {
	if n == nil {
		return nil
	}
	if n.conn != nil {
		n.conn.Close()
	}
	for _, s := range n.running {
		s.Shutdown()
		s.WaitForShutdown()
	}
	return os.RemoveAll(n.dir)
}

// conditions says what was measured on.
func natsConditions() string {
	return "NATS server " + natsd.VERSION + " within the program that starts the runs, sync_interval: always; loopback TCP"
}

func init() {
	register("nats-publish", benchCase{
		workload: "append", store: "nats", unit: "events",
		guarantees: "one event a commit, conditions on the subject's last sequence, no versions",
		open:       openPublish,
	})
	register("nats-consumer", benchCase{
		workload: "load", store: "nats", table: true, unit: "loads",
		guarantees: "messages of deed's own log, read and dropped",
		open:       openConsumer,
	})
}

// openNATS connects, and returns the log that the URL names.
func openNATS(p params) (*nats.Conn, jetstream.JetStream, string, int, error) {
	u, err := url.Parse(p.Store)
	if err != nil {
		return nil, nil, "", 0, fmt.Errorf("the store %q: %w", p.Store, err)
	}
	name, replicas := u.Query().Get("stream"), 1
	if text := u.Query().Get("replicas"); text != "" {
		if replicas, err = strconv.Atoi(text); err != nil {
			return nil, nil, "", 0, fmt.Errorf("the store %q: %w", p.Store, err)
		}
	}
	u.RawQuery, u.Path = "", ""
	conn, err := nats.Connect(u.String())
	if err != nil {
		return nil, nil, "", 0, err
	}
	js, err := jetstream.New(conn)
	if err != nil {
		conn.Close()
	}
	return conn, js, name, replicas, err
}

func closeConn(conn *nats.Conn) func() error {
	return func() error { conn.Close(); return nil }
}

// wrongSequence is what a cluster also answers while the message before is
// acknowledged and not yet applied.
const wrongSequence = 10164

// openPublish publishes as one would by hand: each writer has a subject, and
// says what its last sequence must be.
func openPublish(ctx context.Context, p params) (*job, error) {
	_, data, err := newOrder(p.Payload)
	if err != nil {
		return nil, err
	}
	conn, js, name, replicas, err := openNATS(p)
	if err != nil {
		return nil, err
	}
	log, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}, Replicas: replicas})
	if err != nil {
		conn.Close()
		return nil, err
	}
	cursors, lasts := newCursors(p), make([]uint64, p.Writers)
	return &job{
		close:      closeConn(conn),
		durability: fmt.Sprintf("synced: R%d, sync always", replicas),
		op: func(ctx context.Context, worker int) (int, error) {
			at := cursors[worker].advance()
			m := &nats.Msg{Subject: name + "." + at.stream, Data: data, Header: nats.Header{
				"Id": {newID().String()}, "Type": {orderType}, "Time": {time.Now().UTC().Format(time.RFC3339Nano)},
				"Version": {strconv.FormatInt(at.version, 10)}, "Metadata": {metadata},
			}}
			for {
				ack, err := js.PublishMsg(ctx, m, jetstream.WithExpectLastSequencePerSubject(lasts[worker]))
				if refused, ok := errors.AsType[*jetstream.APIError](err); ok && refused.ErrorCode == wrongSequence && replicas > 1 {
					time.Sleep(100 * time.Microsecond)
					continue
				}
				if err != nil {
					return 0, err
				}
				lasts[worker] = ack.Sequence
				return 1, nil
			}
		},
		verify: func(ctx context.Context, done int64) error {
			info, err := log.Info(ctx)
			if err != nil {
				return err
			}
			if n := int64(info.State.Msgs); n != done {
				return fmt.Errorf("the stream has %d messages, but %d were acknowledged", n, done)
			}
			return nil
		},
	}, nil
}

// openConsumer reads random streams of 100 events whole, each by an ordered
// consumer of its own.
func openConsumer(ctx context.Context, p params) (*job, error) {
	conn, js, name, _, err := openNATS(p)
	if err != nil {
		return nil, err
	}
	subjects, err := fullSubjects(ctx, js, name)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &job{
		close:      closeConn(conn),
		durability: "reads only",
		notes:      fmt.Sprintf("%d streams", len(subjects)),
		op: func(ctx context.Context, _ int) (int, error) {
			subject := subjects[rand.IntN(len(subjects))]
			consumer, err := js.OrderedConsumer(ctx, name, jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}, InactiveThreshold: time.Second})
			if err != nil {
				return 0, err
			}
			batch, err := consumer.Fetch(streamSize, jetstream.FetchMaxWait(10*time.Second))
			if err != nil {
				return 0, err
			}
			n := 0
			for range batch.Messages() {
				n++
			}
			if n != streamSize || batch.Error() != nil {
				return 0, errors.Join(fmt.Errorf("%d of %d events of %s", n, streamSize, subject), batch.Error())
			}
			return 1, nil
		},
	}, nil
}

// fullSubjects returns those with as many events as a load is to read.
func fullSubjects(ctx context.Context, js jetstream.JetStream, name string) ([]string, error) {
	log, err := js.Stream(ctx, name)
	if err != nil {
		return nil, err
	}
	info, err := log.Info(ctx, jetstream.WithSubjectFilter(name+".>"))
	if err != nil {
		return nil, err
	}
	var full []string
	for subject, n := range info.State.Subjects {
		if n == streamSize {
			full = append(full, subject)
		}
	}
	if len(full) == 0 {
		return nil, fmt.Errorf("no subject of %s has %d messages: fill it with deed bench load --preload N first", name, streamSize)
	}
	return full, nil
}
