package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A spec is one thing to run: a benchmark of deed's own, or a case of bench.
type spec struct {
	name      string   // unique; rows and tables call it so
	workload  string   // of deed; empty for a case
	bench     string   // name of the case; empty for deed
	store     string   // "postgres", "sqlite", "memory", "nats" or "nats-r3", three servers
	full      string   // which filled log it runs on; a fresh database when empty
	writes    bool     // a filled log is copied for each run
	processes int      // how many processes do the work at once; 1 when 0
	args      []string // flags, beside those of every run
}

// Filled logs are made once, by deed itself: the value is how.
var fills = map[string][]string{
	"plain":  {"replay"},
	"tagged": {"append-dcb", "--tags", "2"},
	"mixed":  {"load", "--in-turn", "1"}, // the events of a stream lie a thousand apart
}

// A row compares deed with a baseline, or with a time.
type row struct {
	id    string
	title string
	deed  *spec
	base  *spec // nil: the bars are times
	floor float64
	goal  float64 // 0: no bar
	note  string
}

// Every append, on both sides, is one event of 256 bytes, and writers share no
// stream: conflicts are not what is measured.
var (
	append64   = &spec{name: "deed append, 64 writers", workload: "append", store: "postgres", args: writers(64)}
	append1000 = &spec{name: "deed append, 64 writers, 1,000 streams", workload: "append", store: "postgres", args: append(writers(64), "--streams", "1000")}
	append1024 = &spec{name: "deed append, 1024 writers", workload: "append", store: "postgres", args: writers(1024)}
	append1    = &spec{name: "deed append, 1 writer", workload: "append", store: "postgres", args: writers(1)}
	append3x21 = &spec{name: "deed append, 3 processes of 21 writers", workload: "append", store: "postgres", processes: 3, args: writers(21)}

	insert64    = &spec{name: "INSERT, 64 writers", bench: "plain-insert", store: "postgres", args: writers(64)}
	lock64      = &spec{name: "advisory lock and INSERT, 64 writers", bench: "plain-lock-insert", store: "postgres", args: writers(64)}
	select1     = &spec{name: "SELECT version and INSERT, 1 writer", bench: "plain-select-insert", store: "postgres", args: writers(1)}
	hallgren64  = &spec{name: "hallgren, 64 writers", bench: "hallgren-postgres", store: "postgres", args: writers(64)}
	watermill64 = &spec{name: "watermill, 64 publishers, 1 consumer", bench: "watermill-postgres", store: "postgres", args: writers(64)}

	dcb64      = &spec{name: "deed append-dcb, 64 writers, 2 tags", workload: "append-dcb", store: "postgres", full: "tagged", writes: true, args: append(writers(64), "--tags", "2")}
	tagged64   = &spec{name: "deed append, 64 writers, 2 tags", workload: "append", store: "postgres", full: "tagged", writes: true, args: append(writers(64), "--tags", "2")}
	untagged64 = &spec{name: "deed append, 64 writers, full log", workload: "append", store: "postgres", full: "tagged", writes: true, args: writers(64)}

	load1      = &spec{name: "deed load, 1 reader", workload: "load", store: "postgres", full: "plain", args: writers(1)}
	load16     = &spec{name: "deed load, 16 readers", workload: "load", store: "postgres", full: "plain", args: writers(16)}
	plainLoad1 = &spec{name: "SELECT a stream, 1 reader", bench: "plain-load", store: "postgres", full: "plain", args: writers(1)}
	plainLoad2 = &spec{name: "SELECT a stream, 16 readers", bench: "plain-load", store: "postgres", full: "plain", args: writers(16)}
	replay     = &spec{name: "deed replay", workload: "replay", store: "postgres", full: "plain"}
	plainPages = &spec{name: "SELECT pages of 10,000", bench: "plain-replay", store: "postgres", full: "plain", args: writers(1)}
	project    = &spec{name: "deed project", workload: "project", store: "postgres", full: "plain", writes: true}

	execute64 = &spec{name: "deed execute, 64 callers, 1,000 aggregates", workload: "execute", store: "postgres", args: append(writers(64), "--aggregates", "1000")}
	execute16 = &spec{name: "deed execute, 16 callers", workload: "execute", store: "postgres", args: append(writers(16), "--aggregates", "1000")}
	// The pool that goes makes itself has as many connections as the driver thinks fit.
	goesOwn  = &spec{name: "goes with its own pool, 16 callers, streams of 10 on average", bench: "goes-execute", store: "postgres", args: append(writers(16), "--events", "10", "--conns", strconv.Itoa(max(4, runtime.NumCPU())))}
	goes16   = &spec{name: "goes with 64 connections, 16 callers, streams of 10 on average", bench: "goes-execute", store: "postgres", args: append(writers(16), "--events", "10")}
	goes1000 = &spec{name: "goes with 64 connections, 16 callers, 1,000 streams of 10 on average", bench: "goes-execute", store: "postgres", args: append(writers(16), "--events", "10", "--streams", "1000")}
	bare16   = &spec{name: "16 events a COPY, no callers", bench: "bare-copy", store: "postgres", args: writers(1)}

	liveSame  = &spec{name: "deed live, same process", workload: "live", store: "postgres", args: writers(1)}
	liveOther = &spec{name: "deed live, other process", workload: "live", store: "postgres", args: append(writers(1), "--other-process")}

	sqliteAppend   = &spec{name: "deed append on SQLite, 64 writers", workload: "append", store: "sqlite", args: writers(64)}
	sqliteHallgren = &spec{name: "hallgren on SQLite, 64 writers", bench: "hallgren-sqlite", store: "sqlite", args: writers(64)}
	sqliteExecute  = &spec{name: "deed execute on SQLite, 64 callers", workload: "execute", store: "sqlite", args: append(writers(64), "--aggregates", "1000")}
	horizon        = &spec{name: "eventhorizon in memory, 64 callers, streams of 100 on average", bench: "eventhorizon-execute", store: "memory", args: append(writers(64), "--events", "100")}

	sqliteSaga  = &spec{name: "deed saga on SQLite, 64 at once", workload: "saga", store: "sqlite", args: writers(64)}
	goWorkflows = &spec{name: "go-workflows on SQLite, 64 at once", bench: "go-workflows-sqlite", store: "sqlite", args: writers(64)}
	saga        = &spec{name: "deed saga, 64 at once", workload: "saga", store: "postgres", args: writers(64)}
	dbos64      = &spec{name: "DBOS, 64 at once", bench: "dbos-postgres", store: "postgres", args: writers(64)}
	saga1       = &spec{name: "deed saga, one after another", workload: "saga", store: "postgres", args: writers(1)}
	dbos1       = &spec{name: "DBOS, one after another", bench: "dbos-postgres", store: "postgres", args: writers(1)}
	react64     = &spec{name: "deed react, 64 writers", workload: "react", store: "postgres", args: writers(64)}
	river64     = &spec{name: "River, 64 inserting", bench: "river-postgres", store: "postgres", args: writers(64)}

	nats64        = &spec{name: "deed append on NATS, 64 writers", workload: "append", store: "nats", args: writers(64)}
	nats1024      = &spec{name: "deed append on NATS, 1024 writers", workload: "append", store: "nats", args: writers(1024)}
	natsR3x64     = &spec{name: "deed append on NATS R3, 64 writers", workload: "append", store: "nats-r3", args: writers(64)}
	natsR3x1024   = &spec{name: "deed append on NATS R3, 1024 writers", workload: "append", store: "nats-r3", args: writers(1024)}
	natsExecute   = &spec{name: "deed execute on NATS, 64 callers, 1,000 aggregates", workload: "execute", store: "nats", args: append(writers(64), "--aggregates", "1000")}
	natsR3Execute = &spec{name: "deed execute on NATS R3, 64 callers, 1,000 aggregates", workload: "execute", store: "nats-r3", args: append(writers(64), "--aggregates", "1000")}
	natsLoad1     = &spec{name: "deed load on NATS, 1 reader", workload: "load", store: "nats", full: "mixed", args: writers(1)}
	natsLoad16    = &spec{name: "deed load on NATS, 16 readers", workload: "load", store: "nats", full: "mixed", args: writers(16)}

	publish64    = &spec{name: "publish, 64 writers", bench: "nats-publish", store: "nats", args: writers(64)}
	publish1024  = &spec{name: "publish, 1024 writers", bench: "nats-publish", store: "nats", args: writers(1024)}
	publishR3x64 = &spec{name: "publish to R3, 64 writers", bench: "nats-publish", store: "nats-r3", args: writers(64)}
	publishR3x1k = &spec{name: "publish to R3, 1024 writers", bench: "nats-publish", store: "nats-r3", args: writers(1024)}
	consumer1    = &spec{name: "ordered consumer, 1 reader", bench: "nats-consumer", store: "nats", full: "mixed", args: writers(1)}
	consumer16   = &spec{name: "ordered consumer, 16 readers", bench: "nats-consumer", store: "nats", full: "mixed", args: writers(16)}
)

func writers(n int) []string { return []string{"--writers", strconv.Itoa(n)} }

// rows are the comparisons, with the bars that deed set itself: the floor must
// be held, the goal is what it is built for. Rows without bars are for
// orientation.
var rows = []row{
	{id: "1", title: "append, 64 writers, against plain INSERT", deed: append64, base: insert64, floor: 2.5, goal: 3.3},
	{id: "2", title: "append, 64 writers, against lock and INSERT", deed: append64, base: lock64, floor: 10, goal: 14},
	{id: "3", title: "append, 1024 writers, against 64 with plain INSERT", deed: append1024, base: insert64, floor: 4, goal: 6},
	{id: "4", title: "append, 1 writer, against SELECT version and INSERT", deed: append1, base: select1, floor: 1.3, goal: 1.7},
	{id: "5", title: "append, 64 writers, against hallgren", deed: append64, base: hallgren64, floor: 6, goal: 7.5},
	{id: "6a", title: "append-dcb against append, both 2 tags, full log", deed: dcb64, base: tagged64, floor: 0.7, goal: 0.9},
	{id: "6b", title: "append-dcb against append without tags, full log", deed: dcb64, base: untagged64},
	{id: "7", title: "append by 3 processes against 1", deed: append3x21, base: append64, floor: 0.4, goal: 0.6},
	{id: "8a", title: "load of 100 events, 1 reader, against SELECT", deed: load1, base: plainLoad1, floor: 0.9, goal: 1},
	{id: "8b", title: "load of 100 events, 16 readers, against SELECT", deed: load16, base: plainLoad2, floor: 0.9, goal: 1},
	{id: "9", title: "replay of the full log against SELECT in pages", deed: replay, base: plainPages, floor: 1, goal: 1.4},
	{id: "10a", title: "execute, 64 callers, against append, both 1,000 streams", deed: execute64, base: append1000, floor: 0.8, goal: 1},
	{id: "10b", title: "execute, 64 callers, against append to 64 streams", deed: execute64, base: append64},
	{id: "11", title: "execute, 16 callers, against goes with its own pool", deed: execute16, base: goesOwn, floor: 8, goal: 14},
	{id: "11a", title: "execute, 16 callers, against goes with 64 connections", deed: execute16, base: goes16, floor: 8, goal: 14},
	{id: "11b", title: "the same, both on 1,000 streams", deed: execute16, base: goes1000},
	{id: "11c", title: "at most: a COPY of what 16 callers bring, without callers, against goes with 64 connections", deed: bare16, base: goes16},
	{id: "12", title: "live in the same process, p50 after the acknowledgement", deed: liveSame, floor: 0.050, goal: 0.005},
	{id: "13", title: "live in another process, p50 after the acknowledgement", deed: liveOther, floor: 0.5, goal: 0.25},
	{id: "14", title: "a view catching up against replay", deed: project, base: replay, floor: 0.1, goal: 0.25},
	{id: "15", title: "SQLite append, 64 writers, against hallgren", deed: sqliteAppend, base: sqliteHallgren, floor: 12},
	{id: "16", title: "SQLite execute, 64 callers, against eventhorizon in memory", deed: sqliteExecute, base: horizon, floor: 8},
	{id: "17", title: "append against watermill", deed: append64, base: watermill64, note: "watermill publishes and consumes"},
	{id: "18", title: "SQLite sagas of 3 steps against go-workflows", deed: sqliteSaga, base: goWorkflows, floor: 30, goal: 140},
	{id: "19a", title: "sagas of 3 steps, 64 at once, against DBOS", deed: saga, base: dbos64, floor: 3, goal: 8},
	{id: "19b", title: "sagas of 3 steps, one after another, against DBOS", deed: saga1, base: dbos1, floor: 1.2, goal: 1.8},
	{id: "20", title: "reactions against River's jobs, both doing nothing", deed: react64, base: river64, floor: 1},
	{id: "21", title: "NATS append, 64 writers, against publishing", deed: nats64, base: publish64, floor: 1.5},
	{id: "22", title: "NATS append, 1024 writers, against publishing", deed: nats1024, base: publish1024, floor: 8},
	{id: "23a", title: "NATS load of 100 events, 1 reader, against an ordered consumer", deed: natsLoad1, base: consumer1, floor: 5},
	{id: "23b", title: "NATS load of 100 events, 16 readers, against an ordered consumer", deed: natsLoad16, base: consumer16, floor: 5},
	{id: "24", title: "NATS execute, 64 callers, against append", deed: natsExecute, base: nats64},
	{id: "25", title: "NATS R3 append, 64 writers, against publishing", deed: natsR3x64, base: publishR3x64, floor: 0.9},
	{id: "26", title: "NATS R3 append, 1024 writers, against publishing", deed: natsR3x1024, base: publishR3x1k, floor: 0.9},
	{id: "27", title: "NATS R3 execute, 64 callers, against append", deed: natsR3Execute, base: natsR3x64},
}

// choose returns the rows that a list of numbers names: 8 stands for 8a and 8b.
func choose(list string) ([]row, error) {
	if strings.TrimSpace(list) == "" {
		return rows, nil
	}
	var chosen []row
	for id := range strings.SplitSeq(list, ",") {
		id = strings.TrimSpace(id)
		found := false
		for _, r := range rows {
			if r.id == id || strings.TrimRight(r.id, "abc") == id {
				found = true
				if !slices.ContainsFunc(chosen, func(c row) bool { return c.id == r.id }) {
					chosen = append(chosen, r)
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("--rows: there is no row %q: bench list shows them", id)
		}
	}
	return chosen, nil
}

// A group is what runs in turn: rows that share something to run, directly or
// through others.
type group struct {
	rows  []row
	specs []*spec
}

func (r row) specs() []*spec {
	if r.base == nil {
		return []*spec{r.deed}
	}
	return []*spec{r.deed, r.base}
}

func groups(chosen []row) []group {
	var made []group
	for _, r := range chosen {
		// What shares something with the row becomes one group with it.
		var g group
		made = slices.DeleteFunc(made, func(earlier group) bool {
			shares := slices.ContainsFunc(r.specs(), func(s *spec) bool { return slices.Contains(earlier.specs, s) })
			if shares {
				g.rows = append(g.rows, earlier.rows...)
				g.specs = append(g.specs, earlier.specs...)
			}
			return shares
		})
		g.rows = append(g.rows, r)
		for _, s := range r.specs() {
			if !slices.Contains(g.specs, s) {
				g.specs = append(g.specs, s)
			}
		}
		made = append(made, g)
	}
	return made
}

// guarantees of what is run, beside those of deed.
func (s *spec) guarantees() string {
	if s.bench == "" {
		return ""
	}
	return cases[s.bench].guarantees
}

// list prints what there is to run.
func list(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ROW\tWHAT\tFLOOR\tGOAL")
	for _, r := range rows {
		floor, goal := r.bars()
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.id, r.title, floor, goal)
	}
	fmt.Fprintln(t, "\nCASE\tPEER\tSTORE\tGUARANTEES")
	for _, name := range caseNames() {
		c := cases[name]
		peer := "-"
		if c.peer != "" {
			peer = c.peer + " " + moduleVersion(c.peer)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", name, peer, c.store, c.guarantees)
	}
	return t.Flush()
}
