package postgres

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// evidence is what is left when a chaos is over: the log as it lies in the
// database, read with plain SQL, and what processes and readers have noted of
// it while it grew.
type evidence struct {
	log       []chaosRow
	tags      map[int64][]string // the table of tags
	keys      []chaosKey
	processes []testimony
	sightings []sighting
}

// chaosRow is an event of the log.
type chaosRow struct {
	position, version int64
	stream, kind      string
	id                uuid.UUID
	tags              []string
	mark              chaosMark
}

// chaosMark is the content of the chaos' events. Commit names the commit, as
// process/writer/number. After is, for events that were appended on the
// condition that no other one has their type and tags, what the condition began
// after. Beside is, for those whose condition was on another stream, that
// stream, and At the version that it had to have.
type chaosMark struct {
	Commit string `json:"c"`
	N      int    `json:"n"`
	Of     int    `json:"of"`
	After  *int64 `json:"after,omitempty"`
	Beside string `json:"beside,omitempty"`
	At     int64  `json:"at,omitempty"`
}

type chaosKey struct {
	key         string
	first, last int64
}

// testimony is what one process has noted.
type testimony struct {
	process string
	killed  bool // what it was doing then, it could not note
	claims  []claim
}

// claim is what a writer was told about a commit, noted before it did anything
// else. The numbers of a writer's commits follow one another.
type claim struct {
	Writer    int               `json:"w"`
	N         int               `json:"n"`
	Outcome   string            `json:"o"`
	IDs       []uuid.UUID       `json:"ids,omitempty"`
	Key       string            `json:"key,omitempty"`
	First     int64             `json:"first,omitempty"`
	Last      int64             `json:"last,omitempty"`
	Revisions []claimedRevision `json:"revs,omitempty"` // none where it was found by reading
	Why       string            `json:"why,omitempty"`
	Resolved  string            `json:"res,omitempty"` // how an unknown outcome was
	// How often the outcome was unknown: because the writer was in a hurry, and
	// because the database was away.
	Cut  int `json:"cut,omitempty"`
	Lost int `json:"lost,omitempty"`
}

type claimedRevision struct {
	Stream   string `json:"s"`
	Version  int64  `json:"v"`
	Position int64  `json:"p"`
}

// The outcomes of claims.
const (
	claimAck       = "ack"       // the commit is in the log
	claimDuplicate = "duplicate" // the key was somebody else's commit, the receipt is that one's
	claimAgain     = "again"     // the writer's own commit, appended once more on purpose
	claimRefused   = "refused"   // nothing was written
	claimComplaint = "complaint" // something went wrong that must not
)

// sighting is what a reader has seen, in the order in which it did.
type sighting struct {
	who   string
	after int64
	only  func(*chaosRow) bool // nil: everything
	seen  []seenEvent
	whole bool // it had the time to come to the end of the log
}

type seenEvent struct {
	position int64
	id       uuid.UUID
}

// finding is something that must not be. Its kind is one of those below.
type finding struct{ kind, text string }

const (
	foundHole      = "hole"      // positions do not follow one another
	foundVersion   = "version"   // nor do the versions of a stream
	foundTwice     = "twice"     // an event or a commit is there again
	foundTorn      = "torn"      // a part of a commit, or not in one piece
	foundLost      = "lost"      // acknowledged, and not where the receipt says
	foundReceipt   = "receipt"   // the rest of the receipt is not so
	foundRefused   = "refused"   // there, although it was refused
	foundStranger  = "stranger"  // there, and nobody knows of it
	foundKey       = "key"       // the table of keys says something else
	foundTags      = "tags"      // so does the table of tags
	foundCondition = "condition" // it did not hold
	foundSkipped   = "skipped"   // a reader went past an event without seeing it
	foundRepeated  = "repeated"  // a reader saw an event again, or one before it later
	foundOther     = "other"     // a reader saw what is not in the log
	foundMissing   = "missing"   // a reader has not come to the end
	foundComplaint = "complaint" // a process said so
)

// judge returns everything that is wrong.
func (ev *evidence) judge() []finding {
	v := &chaosVerdict{ev: ev, byID: map[uuid.UUID]int{}, byCommit: map[string]int{}, acked: map[string]bool{}}
	v.order()
	v.commits()
	v.claims()
	v.strangers()
	v.keys()
	v.conditions()
	for i := range ev.sightings {
		v.sighting(&ev.sightings[i])
	}
	return v.found
}

type chaosVerdict struct {
	ev       *evidence
	found    []finding
	byID     map[uuid.UUID]int // index in the log
	byCommit map[string]int    // of its first event
	acked    map[string]bool   // commits
	last     map[string]int    // the last number that a writer has noted
	killed   map[string]bool   // processes
}

func (v *chaosVerdict) add(kind, format string, args ...any) {
	v.found = append(v.found, finding{kind, fmt.Sprintf(format, args...)})
}

// order checks positions, versions, ids and tags.
func (v *chaosVerdict) order() {
	versions := map[string]int64{}
	before := int64(0)
	for i := range v.ev.log {
		e := &v.ev.log[i]
		if e.position != before+1 {
			v.add(foundHole, "position %d follows %d", e.position, before)
		}
		before = e.position
		if versions[e.stream]++; e.version != versions[e.stream] {
			v.add(foundVersion, "position %d: %s has version %d where %d belongs", e.position, e.stream, e.version, versions[e.stream])
			versions[e.stream] = e.version
		}
		if at, twice := v.byID[e.id]; twice {
			v.add(foundTwice, "the event at position %d is at %d, too", e.position, v.ev.log[at].position)
		} else {
			v.byID[e.id] = i
		}
		is := slices.Sorted(slices.Values(v.ev.tags[e.position]))
		if want := slices.Sorted(slices.Values(e.tags)); !slices.Equal(want, is) {
			v.add(foundTags, "position %d has the tags %q, and in the table of tags %q", e.position, want, is)
		}
	}
}

// commits checks that each is there in one piece and once.
func (v *chaosVerdict) commits() {
	log := v.ev.log
	for i := 0; i < len(log); {
		m := log[i].mark
		if at, twice := v.byCommit[m.Commit]; twice {
			v.add(foundTwice, "commit %s at position %d is at %d, too", m.Commit, log[i].position, log[at].position)
		} else {
			v.byCommit[m.Commit] = i
		}
		n := 1
		for i+n < len(log) && log[i+n].mark.Commit == m.Commit {
			n++
		}
		whole := n == m.Of
		for k := range n {
			whole = whole && log[i+k].mark.N == k+1 && log[i+k].position == log[i].position+int64(k)
		}
		if !whole {
			v.add(foundTorn, "commit %s of %d events is not in one piece at position %d", m.Commit, m.Of, log[i].position)
		}
		i += n
	}
}

// claims checks what the writers were told.
func (v *chaosVerdict) claims() {
	v.last, v.killed = map[string]int{}, map[string]bool{}
	stored := map[string]chaosKey{}
	for _, k := range v.ev.keys {
		stored[k.key] = k
	}
	for p := range v.ev.processes {
		of := &v.ev.processes[p]
		v.killed[of.process] = of.killed
		for i := range of.claims {
			c := &of.claims[i]
			name := fmt.Sprintf("%s/%d/%d", of.process, c.Writer, c.N)
			writer := fmt.Sprintf("%s/%d", of.process, c.Writer)
			switch next, any := v.last[writer]; {
			case c.Outcome == claimComplaint:
				v.add(foundComplaint, "%s: %s", name, c.Why)
				continue
			case c.Outcome == claimAgain:
			case any && c.N != next+1 || !any && c.N != 0:
				v.add(foundComplaint, "%s was noted after number %d: notes were lost", name, next)
				fallthrough
			default:
				v.last[writer] = c.N
			}
			switch c.Outcome {
			case claimAck:
				v.acked[name] = true
				v.acknowledged(name, c)
			case claimAgain, claimDuplicate:
				if k := stored[c.Key]; k.first != c.First || k.last != c.Last {
					v.add(foundKey, "%s with key %q was answered %d to %d, and the key is that of %d to %d", name, c.Key, c.First, c.Last, k.first, k.last)
				} else {
					v.revisions(name, c)
				}
				if c.Outcome == claimDuplicate {
					v.absent(name, c)
				}
			case claimRefused:
				v.absent(name, c)
			}
		}
	}
}

func (v *chaosVerdict) acknowledged(name string, c *claim) {
	for i, id := range c.IDs {
		at, there := v.byID[id]
		if !there {
			v.add(foundLost, "event %d of %s was acknowledged at position %d, and is not there", i+1, name, c.First+int64(i))
			return
		}
		if is := v.ev.log[at].position; is != c.First+int64(i) {
			v.add(foundLost, "event %d of %s was acknowledged at position %d, and is at %d", i+1, name, c.First+int64(i), is)
			return
		}
	}
	if c.Last != c.First+int64(len(c.IDs))-1 {
		v.add(foundReceipt, "%s has %d events, and was acknowledged at positions %d to %d", name, len(c.IDs), c.First, c.Last)
		return
	}
	v.revisions(name, c)
}

// revisions checks those of a receipt whose positions are right.
func (v *chaosVerdict) revisions(name string, c *claim) {
	if len(c.Revisions) == 0 {
		if c.Resolved == "" {
			v.add(foundReceipt, "%s was acknowledged without revisions", name)
		}
		return
	}
	is := map[string]claimedRevision{}
	for _, r := range c.Revisions {
		is[r.Stream] = r
	}
	want := map[string]claimedRevision{}
	at, _ := slices.BinarySearchFunc(v.ev.log, c.First, func(e chaosRow, p int64) int { return int(e.position - p) })
	for ; at < len(v.ev.log) && v.ev.log[at].position <= c.Last; at++ {
		e := &v.ev.log[at]
		want[e.stream] = claimedRevision{e.stream, e.version, e.position}
	}
	if !maps.Equal(is, want) {
		v.add(foundReceipt, "%s was acknowledged with the revisions %v, and they are %v", name, is, want)
	}
}

func (v *chaosVerdict) absent(name string, c *claim) {
	for i, id := range c.IDs {
		if at, there := v.byID[id]; there {
			v.add(foundRefused, "event %d of %s is at position %d, and the answer was %s: %s", i+1, name, v.ev.log[at].position, c.Outcome, c.Why)
		}
	}
}

// strangers checks that the log has nothing but what was acknowledged, and
// what writers were doing when their process was killed.
func (v *chaosVerdict) strangers() {
	for _, name := range slices.Sorted(maps.Keys(v.byCommit)) {
		if v.acked[name] {
			continue
		}
		position := v.ev.log[v.byCommit[name]].position
		var n int
		cut := strings.LastIndexByte(name, '/')
		if _, err := fmt.Sscan(name[cut+1:], &n); err != nil {
			v.add(foundStranger, "commit %q at position %d", name, position)
			continue
		}
		process, _, _ := strings.Cut(name, "/")
		last, any := v.last[name[:cut]]
		if !v.killed[process] || any && n != last+1 || !any && n != 0 {
			v.add(foundStranger, "commit %s at position %d was not acknowledged; the writer's last note is about number %d", name, position, last)
		}
	}
}

// keys compares the table of keys with the commits.
func (v *chaosVerdict) keys() {
	want := map[string]string{} // key -> commit
	for p := range v.ev.processes {
		of := &v.ev.processes[p]
		for i := range of.claims {
			c := &of.claims[i]
			if c.Outcome != claimAck || c.Key == "" {
				continue
			}
			name := fmt.Sprintf("%s/%d/%d", of.process, c.Writer, c.N)
			if other, used := want[c.Key]; used {
				v.add(foundKey, "%s and %s were both acknowledged with the key %q", other, name, c.Key)
			}
			want[c.Key] = name
		}
	}
	seen := map[string]bool{}
	for _, k := range v.ev.keys {
		if seen[k.key] {
			v.add(foundKey, "the key %q is stored twice", k.key)
		}
		seen[k.key] = true
		at, _ := slices.BinarySearchFunc(v.ev.log, k.first, func(e chaosRow, p int64) int { return int(e.position - p) })
		if at == len(v.ev.log) || v.ev.log[at].position != k.first {
			v.add(foundKey, "the key %q is that of %d to %d, where nothing is", k.key, k.first, k.last)
			continue
		}
		e := &v.ev.log[at]
		if e.mark.N != 1 || k.last != k.first+int64(e.mark.Of)-1 {
			v.add(foundKey, "the key %q is that of %d to %d, which is not a commit: %+v", k.key, k.first, k.last, e.mark)
		}
		if commit, acked := want[k.key]; acked && commit != e.mark.Commit || !acked && v.acked[e.mark.Commit] {
			v.add(foundKey, "the key %q is that of commit %s, and was acknowledged for %q", k.key, e.mark.Commit, commit)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if !seen[key] {
			v.add(foundKey, "the key %q, acknowledged for %s, is not stored", key, want[key])
		}
	}
}

// conditions checks those that events tell of: at their position, and not
// where they were decided.
func (v *chaosVerdict) conditions() {
	before, versions := map[string]int64{}, map[string]int64{}
	for i := range v.ev.log {
		e := &v.ev.log[i]
		if s := e.mark.Beside; s != "" && versions[s] != e.mark.At {
			v.add(foundCondition, "position %d was appended on the condition that %s has version %d, and it had %d", e.position, s, e.mark.At, versions[s])
		}
		versions[e.stream] = e.version
		if e.mark.After == nil {
			continue
		}
		what := e.kind + " " + strings.Join(e.tags, " ")
		if last := before[what]; last > *e.mark.After {
			v.add(foundCondition, "position %d: %s was appended on the condition that there is none after %d, and there is one at %d", e.position, what, *e.mark.After, last)
		}
		before[what] = e.position
	}
}

// sighting compares what a reader has seen with what it had to.
func (v *chaosVerdict) sighting(s *sighting) {
	next, before := 0, s.after
	var want []*chaosRow
	for i := range v.ev.log {
		if e := &v.ev.log[i]; e.position > s.after && (s.only == nil || s.only(e)) {
			want = append(want, e)
		}
	}
	for _, e := range s.seen {
		if e.position <= before {
			v.add(foundRepeated, "%s: position %d was seen after %d", s.who, e.position, before)
			continue
		}
		before = e.position
		for next < len(want) && want[next].position < e.position {
			v.add(foundSkipped, "%s: position %d was not seen, %d was", s.who, want[next].position, e.position)
			next++
		}
		switch {
		case next == len(want) || want[next].position > e.position:
			v.add(foundOther, "%s: position %d was seen, and is not there", s.who, e.position)
		case want[next].id != e.id:
			v.add(foundOther, "%s: the event seen at position %d is not the one that is there", s.who, e.position)
			next++
		default:
			next++
		}
	}
	if s.whole && next < len(want) {
		v.add(foundMissing, "%s: the last event seen is at %d, %d more follow up to %d", s.who, before, len(want)-next, want[len(want)-1].position)
	}
}

// findings counts findings by kind.
func findings(found []finding) map[string]int {
	n := map[string]int{}
	for _, f := range found {
		n[f.kind]++
	}
	return n
}

// report shows the first findings of each kind.
func report(found []finding) string {
	var b strings.Builder
	shown := map[string]int{}
	for _, f := range found {
		if shown[f.kind]++; shown[f.kind] <= 5 {
			fmt.Fprintf(&b, "  %s: %s\n", f.kind, f.text)
		}
	}
	return fmt.Sprintf("%v\n%s", findings(found), b.String())
}

// exhume reads the log past everything that the store does to read it.
func exhume(ctx context.Context, conn *pgx.Conn, ev *evidence) error {
	rows, err := conn.Query(ctx, `SELECT e.position, e.version, e.stream, k.type, e.id, coalesce(e.tags, '{}'), e.data
		FROM deed.events e JOIN deed.kinds k ON k.id = e.kind ORDER BY e.position`)
	if err != nil {
		return err
	}
	ev.log, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (chaosRow, error) {
		var e chaosRow
		var data []byte
		if err := row.Scan(&e.position, &e.version, &e.stream, &e.kind, &e.id, &e.tags, &data); err != nil {
			return e, err
		}
		return e, json.Unmarshal(data, &e.mark)
	})
	if err != nil {
		return err
	}
	if rows, err = conn.Query(ctx, "SELECT position, tag FROM deed.tags"); err != nil {
		return err
	}
	ev.tags = map[int64][]string{}
	var position int64
	var tag string
	if _, err := pgx.ForEachRow(rows, []any{&position, &tag}, func() error {
		ev.tags[position] = append(ev.tags[position], tag)
		return nil
	}); err != nil {
		return err
	}
	if rows, err = conn.Query(ctx, "SELECT key, first, last FROM deed.keys"); err != nil {
		return err
	}
	ev.keys, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (k chaosKey, err error) {
		return k, row.Scan(&k.key, &k.first, &k.last)
	})
	return err
}

// The files of sightings: what the reader began after, and then 24 bytes an
// event. A process that was killed may have left a part of the last one.
func appendSeen(to []byte, position uint64, id uuid.UUID) []byte {
	return append(binary.BigEndian.AppendUint64(to, position), id[:]...)
}

func parseSeen(file []byte) (after int64, seen []seenEvent) {
	if len(file) < 8 {
		return 0, nil
	}
	after, file = int64(binary.BigEndian.Uint64(file)), file[8:]
	for ; len(file) >= 24; file = file[24:] {
		seen = append(seen, seenEvent{int64(binary.BigEndian.Uint64(file)), uuid.UUID(file[8:24])})
	}
	return after, seen
}

// Every check of the verdict fails when what it is about is not so.
func TestChaos_VerdictNotices(t *testing.T) {
	t.Parallel()
	id := func(n byte) uuid.UUID { return uuid.UUID{15: n} }
	zero := int64(0)
	sound := func() *evidence {
		mark := func(commit string, n, of int) chaosMark { return chaosMark{Commit: commit, N: n, Of: of} }
		ev := &evidence{
			log: []chaosRow{
				{position: 1, version: 1, stream: "a-1", kind: "k", id: id(1), mark: mark("p/0/0", 1, 1)},
				{position: 2, version: 2, stream: "a-1", kind: "k", id: id(2), mark: mark("p/0/1", 1, 2)},
				{position: 3, version: 1, stream: "b-1", kind: "k", id: id(3), mark: mark("p/0/1", 2, 2), tags: []string{"t", "u"}},
				{position: 4, version: 3, stream: "a-1", kind: "k", id: id(4), mark: mark("q/0/0", 1, 1)},
				{position: 5, version: 2, stream: "b-1", kind: "s", id: id(5), mark: chaosMark{Commit: "p/1/0", N: 1, Of: 1, After: &zero}, tags: []string{"t"}},
				{position: 6, version: 3, stream: "b-1", kind: "k", id: id(6), mark: mark("q/0/1", 1, 1)},
			},
			tags: map[int64][]string{3: {"u", "t"}, 5: {"t"}},
			keys: []chaosKey{{"key", 2, 3}},
			processes: []testimony{
				{process: "p", claims: []claim{
					{N: 0, Outcome: claimAck, IDs: []uuid.UUID{id(1)}, First: 1, Last: 1, Revisions: []claimedRevision{{"a-1", 1, 1}}},
					{N: 1, Outcome: claimAck, IDs: []uuid.UUID{id(2), id(3)}, Key: "key", First: 2, Last: 3, Revisions: []claimedRevision{{"a-1", 2, 2}, {"b-1", 1, 3}}},
					{N: 1, Outcome: claimAgain, IDs: []uuid.UUID{id(2), id(3)}, Key: "key", First: 2, Last: 3, Revisions: []claimedRevision{{"a-1", 2, 2}, {"b-1", 1, 3}}},
					{N: 2, Outcome: claimRefused, IDs: []uuid.UUID{id(9)}},
					{Writer: 1, N: 0, Outcome: claimAck, IDs: []uuid.UUID{id(5)}, First: 5, Last: 5, Resolved: "stream"},
				}},
				{process: "q", killed: true, claims: []claim{
					{N: 0, Outcome: claimAck, IDs: []uuid.UUID{id(4)}, First: 4, Last: 4, Revisions: []claimedRevision{{"a-1", 3, 4}}},
				}},
				{process: "r", claims: []claim{
					{N: 0, Outcome: claimDuplicate, IDs: []uuid.UUID{id(8)}, Key: "key", First: 2, Last: 3, Revisions: []claimedRevision{{"a-1", 2, 2}, {"b-1", 1, 3}}},
				}},
			},
		}
		all := sighting{who: "all", whole: true}
		some := sighting{who: "some", after: 1, only: func(e *chaosRow) bool { return e.stream == "a-1" }, seen: []seenEvent{{2, id(2)}}}
		for _, e := range ev.log {
			all.seen = append(all.seen, seenEvent{e.position, e.id})
		}
		ev.sightings = []sighting{all, some}
		return ev
	}
	require.Empty(t, sound().judge(), "nothing is wrong")

	type tampering struct {
		kind string
		with func(*evidence)
	}
	for name, c := range map[string]tampering{
		"a hole":                       {foundHole, func(ev *evidence) { ev.log[5].position = 7 }},
		"it does not begin at 1":       {foundHole, func(ev *evidence) { ev.log = ev.log[1:] }},
		"a version left out":           {foundVersion, func(ev *evidence) { ev.log[3].version = 4 }},
		"a version again":              {foundVersion, func(ev *evidence) { ev.log[3].version = 2 }},
		"an event twice":               {foundTwice, func(ev *evidence) { ev.log[4].id = id(1) }},
		"a commit twice":               {foundTwice, func(ev *evidence) { ev.log[3].mark.Commit = "p/0/0" }},
		"a part of a commit":           {foundTorn, func(ev *evidence) { ev.log[5].mark.Of = 2 }},
		"in another order":             {foundTorn, func(ev *evidence) { ev.log[1].mark.N, ev.log[2].mark.N = 2, 1 }},
		"an acknowledged one gone":     {foundLost, func(ev *evidence) { ev.log[0].id = id(7) }},
		"elsewhere":                    {foundLost, func(ev *evidence) { ev.processes[0].claims[0].First, ev.processes[0].claims[0].Last = 2, 2 }},
		"a wrong end":                  {foundReceipt, func(ev *evidence) { ev.processes[0].claims[0].Last = 2 }},
		"a wrong version":              {foundReceipt, func(ev *evidence) { ev.processes[0].claims[0].Revisions[0].Version = 2 }},
		"a stream left out":            {foundReceipt, func(ev *evidence) { ev.processes[0].claims[1].Revisions = ev.processes[0].claims[1].Revisions[:1] }},
		"no revisions":                 {foundReceipt, func(ev *evidence) { ev.processes[0].claims[0].Revisions = nil }},
		"a refused one":                {foundRefused, func(ev *evidence) { ev.processes[0].claims[3].IDs[0] = id(4) }},
		"a duplicate that was written": {foundRefused, func(ev *evidence) { ev.processes[2].claims[0].IDs[0] = id(4) }},
		"a duplicate's receipt":        {foundKey, func(ev *evidence) { ev.processes[2].claims[0].First = 1 }},
		"a duplicate's version":        {foundReceipt, func(ev *evidence) { ev.processes[2].claims[0].Revisions[1].Version = 2 }},
		"another receipt, again":       {foundKey, func(ev *evidence) { ev.processes[0].claims[2].Last = 2 }},
		"nobody's":                     {foundStranger, func(ev *evidence) { ev.processes[1].killed = false }},
		"too much of a killed process": {foundStranger, func(ev *evidence) { ev.log[5].mark.Commit = "q/0/2" }},
		"no key":                       {foundKey, func(ev *evidence) { ev.keys = nil }},
		"a key twice":                  {foundKey, func(ev *evidence) { ev.keys = append(ev.keys, ev.keys[0]) }},
		"a key of another commit":      {foundKey, func(ev *evidence) { ev.keys[0] = chaosKey{"key", 4, 4} }},
		"a key of a part":              {foundKey, func(ev *evidence) { ev.keys[0].last = 2 }},
		"a key that nobody used":       {foundKey, func(ev *evidence) { ev.keys = append(ev.keys, chaosKey{"other", 1, 1}) }},
		"a key used twice": {foundKey, func(ev *evidence) {
			ev.processes[1].claims[0].Key = "key"
		}},
		"a tag without a row":  {foundTags, func(ev *evidence) { ev.tags[3] = []string{"t"} }},
		"a row without a tag":  {foundTags, func(ev *evidence) { ev.tags[1] = []string{"t"} }},
		"a broken condition":   {foundCondition, func(ev *evidence) { ev.log[5].kind, ev.log[5].tags, ev.log[5].mark.After = "s", []string{"t"}, &zero }},
		"a condition beside":   {foundCondition, func(ev *evidence) { ev.log[5].mark.Beside, ev.log[5].mark.At = "a-1", 2 }},
		"a skipped event":      {foundSkipped, func(ev *evidence) { ev.sightings[0].seen = slices.Delete(ev.sightings[0].seen, 2, 3) }},
		"a repeated event":     {foundRepeated, func(ev *evidence) { ev.sightings[1].seen = append(ev.sightings[1].seen, ev.sightings[1].seen[0]) }},
		"disorder":             {foundRepeated, func(ev *evidence) { s := ev.sightings[0].seen; s[1], s[2] = s[2], s[1] }},
		"an event before":      {foundRepeated, func(ev *evidence) { ev.sightings[1].seen = slices.Insert(ev.sightings[1].seen, 0, seenEvent{1, id(1)}) }},
		"one it did not want":  {foundOther, func(ev *evidence) { ev.sightings[1].seen = append(ev.sightings[1].seen, seenEvent{3, id(3)}) }},
		"another event":        {foundOther, func(ev *evidence) { ev.sightings[0].seen[2].id = id(9) }},
		"not to the end":       {foundMissing, func(ev *evidence) { ev.sightings[0].seen = ev.sightings[0].seen[:4] }},
		"the filtered, either": {foundMissing, func(ev *evidence) { ev.sightings[1].whole = true }},
		"a complaint": {foundComplaint, func(ev *evidence) {
			ev.processes[0].claims = append(ev.processes[0].claims, claim{Outcome: claimComplaint, Why: "it hurts"})
		}},
		"lost notes": {foundComplaint, func(ev *evidence) { ev.processes[0].claims = slices.Delete(ev.processes[0].claims, 1, 3) }},
	} {
		t.Run(name, func(t *testing.T) {
			ev := sound()
			c.with(ev)
			require.Contains(t, findings(ev.judge()), c.kind, "%+v", ev.judge())
		})
	}
}
