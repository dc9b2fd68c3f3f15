//go:build unix

package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/eventstore/nats"
	"github.com/deed-go/deed/projection"
	"github.com/deed-go/deed/saga"
)

// parcel is what the log of TestNodes is full of.
type parcel struct {
	N      int64    `json:"n"`
	Labels []string `json:"labels"`
	Bonus  bool     `json:"bonus"`
}

func (parcel) EventType() string { return "parcel.sent" }

// trail is a row of every read model. Its hash is another one when an event is
// missing, comes twice, or comes in another order.
type trail struct {
	Events int64  `json:"events"`
	Sum    int64  `json:"sum"`
	Last   uint64 `json:"last"`
	Hash   uint64 `json:"hash"`
}

func (r *trail) follow(n int64, position uint64) {
	r.Events, r.Sum, r.Last = r.Events+1, r.Sum+n, position
	r.Hash = (r.Hash*31 + position) % (1 << 40)
}

// nodeModel is a read model of the nodes: which rows an event is for.
type nodeModel struct {
	name    string
	parts   int
	sql     bool
	indexed bool
	keys    func(stream string, e parcel) []string // nil: the stream's
}

func labelsOf(_ string, e parcel) []string { return e.Labels }

// The last three are those that a node can be stopped in.
const (
	wholeModel = "whole"
	sqlModel   = "ledger"
)

var nodeModels = []nodeModel{
	{name: "streams"},
	{name: "streams_parted", parts: 4},
	{name: "labels", keys: labelsOf},
	{name: "labels_parted", parts: 4, keys: labelsOf},
	{name: "both_parted", parts: 4, keys: func(stream string, e parcel) []string { return append([]string{"stream " + stream}, e.Labels...) }},
	{name: "sums", indexed: true},
	{name: "sums_parted", parts: 4, indexed: true, keys: labelsOf},
	{name: "digits", keys: func(_ string, e parcel) []string { return []string{fmt.Sprint(e.N % 10)} }},
	{name: "some", keys: func(_ string, e parcel) []string {
		return slices.DeleteFunc(slices.Clone(e.Labels), func(l string) bool { return len(l)%2 == 0 })
	}},
	{name: wholeModel, keys: func(string, parcel) []string { return []string{"all"} }},
	{name: sqlModel, sql: true},
	{name: "ledger_parted", sql: true, parts: 4},
}

// rows says which rows of the model the event is for.
func (m *nodeModel) rows(stream string, e parcel) []string {
	if m.keys == nil {
		return []string{stream}
	}
	return m.keys(stream, e)
}

// units is the names of the leases of the model.
func (m *nodeModel) units() []string {
	if m.parts < 2 {
		return []string{"projection." + m.name}
	}
	var all []string
	for i := range m.parts {
		all = append(all, fmt.Sprintf("projection.%s/%dof%d", m.name, i+1, m.parts))
	}
	return all
}

// The leases of the processes.
const (
	receiptsUnit = "reaction receipts"
	bonusUnit    = "saga bonus"
)

func nodeUnits() []string {
	all := []string{receiptsUnit, bonusUnit}
	for i := range nodeModels {
		all = append(all, nodeModels[i].units()...)
	}
	return all
}

// definition is the model as an application is given it; node is who writes to
// the tables of SQL.
func (m *nodeModel) definition(node string, freeze *freezer) projection.Projection {
	if m.sql {
		d := projection.SQL(m.name,
			projection.Setup(`CREATE TABLE IF NOT EXISTS public.`+m.name+` (id text PRIMARY KEY, events bigint, sum bigint, last bigint, hash bigint)`,
				`CREATE TABLE IF NOT EXISTS public.`+m.name+`_applied (position bigint, node text)`),
			projection.Reset(`TRUNCATE public.`+m.name, `TRUNCATE public.`+m.name+`_applied`),
			projection.OnSQL(func(ctx context.Context, tx projection.Tx, e parcel, r eventstore.Recorded) error {
				// Were an event applied twice, there would be nothing to stop it.
				if _, err := tx.Exec(ctx, `INSERT INTO public.`+m.name+`_applied VALUES ($1, $2)`, int64(r.Position), node); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `INSERT INTO public.`+m.name+` AS t VALUES ($1, 1, $2, $3, $3 % (1::bigint << 40))
					ON CONFLICT (id) DO UPDATE SET events = t.events + 1, sum = t.sum + excluded.sum, last = excluded.last,
					hash = (t.hash * 31 + excluded.last) % (1::bigint << 40)`, r.Stream.ID, e.N, int64(r.Position))
				freeze.now()
				return err
			}))
		if m.parts > 1 {
			d = d.Partitioned(m.parts)
		}
		return d
	}
	fold := func(row *trail, e parcel, r eventstore.Recorded) {
		row.follow(e.N, uint64(r.Position))
		freeze.now()
	}
	part := projection.OnMeta(fold)
	if m.keys != nil {
		part = projection.OnKeyed(func(e parcel, r eventstore.Recorded) []string { return m.keys(r.Stream.ID, e) },
			func(row *trail, _ string, e parcel, r eventstore.Recorded) { fold(row, e, r) })
	}
	d := projection.View(m.name, part)
	if m.indexed {
		d = d.Indexed(projection.Index("sum", func(row trail) int64 { return row.Sum }))
	}
	if m.parts > 1 {
		d = d.Partitioned(m.parts)
	}
	return d
}

// purse gets a bonus for some of the parcels.
type purse struct{ Bonuses int }

type rewarded struct{ Parcel string }

func (rewarded) EventType() string { return "purse.rewarded" }

var purses = aggregate.Define("purse", aggregate.On(func(p *purse, _ rewarded) { p.Bonuses++ }))

type reward struct{ Purse, Parcel string }

func (c reward) AggregateID() string { return c.Purse }

func (c reward) Decide(purse) ([]aggregate.Event, error) {
	return aggregate.Events(rewarded{c.Parcel}), nil
}

var bonus = saga.Define("bonus", func(s *saga.Run, in reward) (int, error) {
	return 0, saga.Execute(s, "reward", purses, in)
}, saga.On(func(e parcel, r eventstore.Recorded) (string, reward) {
	if !e.Bonus {
		return "", reward{}
	}
	return r.ID.String(), reward{Purse: fmt.Sprint(e.N % 5), Parcel: r.ID.String()}
})).FromStart()

// receipts writes down every parcel, as something outside of the log would.
func receipts(p *pgxpool.Pool) *saga.Reaction {
	return saga.React("receipts", func(step saga.Step, _ parcel) error {
		_, err := p.Exec(step, `INSERT INTO public.receipts VALUES ($1) ON CONFLICT DO NOTHING`, step.Event().ID)
		return err
	}).FromStart()
}

const fencedAttempt = "refused" // a node says it of a lease under which it tried to commit too late

// witness is the state of a node, which tells what the state refuses. After the
// node was stopped for a while its updates end as if nobody told them that the
// turn is over: they were on their way already.
type witness struct {
	*Store
	late     atomic.Bool
	careless bool // the epoch is not looked at
}

func (w *witness) Update(ctx context.Context, fn func(projection.StateTx) error) error {
	if w.late.Load() || w.careless {
		ctx = context.WithoutCancel(ctx)
	}
	return w.Store.Update(ctx, func(tx projection.StateTx) error { return fn(&witnessTx{tx.(*stateTx), w}) })
}

type witnessTx struct {
	*stateTx
	w *witness
}

func (t *witnessTx) heard(lease projection.Lease, err error) error {
	// It may also have been this owner's own update, of which it did not learn, that
	// has moved the checkpoint.
	if errors.Is(err, projection.ErrFenced) && strings.Contains(err.Error(), "is current") {
		say(fencedAttempt, lease.Name)
	}
	return err
}

func (t *witnessTx) Fence(lease projection.Lease) error {
	if t.w.careless {
		// Nor does the server end what a process that is stopped has begun.
		_, err := t.tx.Exec(t.ctx, "SET LOCAL idle_in_transaction_session_timeout = 0")
		return t.broke("be careless", err)
	}
	return t.heard(lease, t.stateTx.Fence(lease))
}

func (t *witnessTx) DeleteCheckpoint(lease projection.Lease) error {
	return t.heard(lease, t.stateTx.DeleteCheckpoint(lease))
}

func (t *witnessTx) SetCheckpoint(lease projection.Lease, from, to projection.Checkpoint) error {
	if !t.w.careless {
		return t.heard(lease, t.stateTx.SetCheckpoint(lease, from, to))
	}
	// As the real one, without a look at the lease.
	if err := t.oneAtATime(); err != nil {
		return err
	}
	t.saved = false
	moved, err := t.tx.Exec(t.ctx, `INSERT INTO deed.checkpoints AS c (name, log, epoch, position)
		SELECT $1, $2, $3, $4 WHERE ($5 = '' AND $6 = 0) OR EXISTS (SELECT FROM deed.checkpoints WHERE name = $1)
		ON CONFLICT (name) DO UPDATE SET log = excluded.log, epoch = excluded.epoch, position = excluded.position
		WHERE c.log = $5 AND c.position = $6`, lease.Name, to.Log, int64(lease.Epoch), int64(to.Position), from.Log, int64(from.Position))
	if err == nil && moved.RowsAffected() == 0 {
		return t.fail(fmt.Errorf("%w: checkpoint %q is not where it was", projection.ErrFenced, lease.Name))
	}
	return t.broke("move a checkpoint", err)
}

// witnessed opens the store and keeps the witness for the application.
type witnessed struct {
	opener  eventstore.Opener
	witness *witness
}

func (o witnessed) Open(ctx context.Context) (eventstore.Store, error) {
	s, err := o.opener.Open(ctx)
	if err != nil {
		return nil, err
	}
	o.witness.Store = s.(*Store)
	return s, nil
}

// nodeProcess runs an application until it is told to stop.
func nodeProcess(t *testing.T, plan chaosPlan) {
	w := &witness{careless: plan.Careless}
	freezers := map[string]*freezer{wholeModel: {}, sqlModel: {}}
	for _, f := range freezers {
		f.before = func() { w.late.Store(true) }
		f.after = func() { time.AfterFunc(time.Second, func() { w.late.Store(false) }) }
	}
	control := newControl(freezers)
	p := pool(t, plan.URL, func(c *pgxpool.Config) { c.ConnConfig.RuntimeParams["application_name"] = plan.Name })
	log := appendTo(t, plan, ".log")
	logger := slog.New(slog.NewTextHandler(log, nil))
	options := []Option{Patience(plan.Patience), with(func(s *settings) { s.leaseTTL = plan.Lease })}
	parts := []deed.Part{deed.Logger(logger), deed.State(w), purses, bonus, receipts(p)}
	source := eventstore.Opener(witnessed{Pool(p, options...), w})
	if plan.NATS != "" {
		w.Store = openPool(t, p, options...)
		source = nats.URL(plan.NATS)
		parts = append(parts, deed.Members(nats.Members))
	}
	for i := range nodeModels {
		m := &nodeModels[i]
		freeze := freezers[m.name]
		if freeze == nil {
			freeze = &freezer{}
		}
		parts = append(parts, m.definition(plan.Name, freeze))
	}
	app, err := deed.Start(t.Context(), source, parts...)
	require.NoError(t, err)
	var listening sync.WaitGroup
	listening.Go(control.listen)
	say(chaosReady)
	<-control.term
	require.NoError(t, app.Stop(t.Context()))
	say(chaosDone)
	listening.Wait()
}

// judged is what is known in the end of what the nodes did.
type judged struct {
	parcels []judgedParcel
	models  map[string]map[string]trail // rows, by the names of models
	applied map[string]map[int64]int    // how often an SQL model says to have applied a position
	commits []nodeCommit                // in the order in which they took effect
	receipt map[string]bool             // of parcels
	rewards map[string]int              // of parcels
	dead    int
}

type judgedParcel struct {
	position uint64
	id       string
	stream   string
	parcel
}

// nodeCommit is a move of a checkpoint: by which node under which epoch, and
// which epoch the lease had then.
type nodeCommit struct {
	unit, node, owner        string
	epoch, position, current int64
}

// What a judge finds.
const (
	foundStale     = "commit of a former owner"
	foundOwners    = "two owners under one epoch"
	foundRows      = "rows that are no fold of the log"
	foundApplied   = "events not applied exactly once"
	foundReactions = "reactions and sagas not done once"
)

// judge compares what is there with what must be.
func (j *judged) judge() map[string][]string {
	found := map[string][]string{}
	complain := func(what, format string, args ...any) {
		if len(found[what]) < 10 {
			found[what] = append(found[what], fmt.Sprintf(format, args...))
		}
	}
	last := map[string]nodeCommit{}
	for _, c := range j.commits {
		before, any := last[c.unit]
		if c.epoch != c.current || any && (c.epoch < before.epoch || c.position < before.position) {
			complain(foundStale, "%s: %+v after %+v", c.unit, c, before)
		}
		if any && c.epoch == before.epoch && c.node != before.node {
			complain(foundOwners, "%s: %+v after %+v", c.unit, c, before)
		}
		last[c.unit] = c
	}
	for i := range nodeModels {
		m := &nodeModels[i]
		want := map[string]trail{}
		for _, p := range j.parcels {
			for _, key := range m.rows(p.stream, p.parcel) {
				row := want[key]
				row.follow(p.N, p.position)
				want[key] = row
			}
		}
		got := j.models[m.name]
		for key, row := range want {
			if got[key] != row {
				complain(foundRows, "%s: row %q is %+v and should be %+v", m.name, key, got[key], row)
			}
		}
		if len(got) != len(want) {
			complain(foundRows, "%s: %d rows, and there should be %d", m.name, len(got), len(want))
		}
		if !m.sql {
			continue
		}
		for _, p := range j.parcels {
			if n := j.applied[m.name][int64(p.position)]; n != 1 {
				complain(foundApplied, "%s: the event at %d was applied %d times", m.name, p.position, n)
			}
		}
		if n := len(j.applied[m.name]); n != len(j.parcels) {
			complain(foundApplied, "%s: %d events were applied, and there are %d", m.name, n, len(j.parcels))
		}
	}
	bonuses := 0
	for _, p := range j.parcels {
		if !j.receipt[p.id] {
			complain(foundReactions, "the parcel at %d has no receipt", p.position)
		}
		want := 0
		if p.Bonus {
			want = 1
			bonuses++
		}
		if n := j.rewards[p.id]; n != want {
			complain(foundReactions, "the parcel at %d was rewarded %d times, not %d", p.position, n, want)
		}
	}
	if len(j.receipt) != len(j.parcels) || len(j.rewards) != bonuses {
		complain(foundReactions, "%d receipts for %d parcels, %d rewards for %d bonuses", len(j.receipt), len(j.parcels), len(j.rewards), bonuses)
	}
	if j.dead > 0 {
		complain(foundRows, "%d events were set aside", j.dead)
	}
	return found
}

func complaints(found map[string][]string) string {
	var b strings.Builder
	for what, all := range found {
		fmt.Fprintf(&b, "%s:\n\t%s\n", what, strings.Join(all, "\n\t"))
	}
	return b.String()
}
