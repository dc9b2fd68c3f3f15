package sagavet

import (
	"go/types"
	"regexp"
	"strings"
)

const (
	deedPath = "github.com/deed-go/deed"
	sagaPath = deedPath + "/saga"
)

// kind is what a finding is about, and the category of its diagnostic.
type kind string

const (
	kindTime      kind = "time"
	kindRandom    kind = "random"
	kindIO        kind = "io"
	kindGoroutine kind = "goroutine"
	kindChannel   kind = "channel"
	kindLock      kind = "lock"
	kindOrder     kind = "order"
	kindRun       kind = "run"
	kindDirective kind = "directive"
)

// why says what is wrong with it: what follows "it" or "which".
func (k kind) why() string {
	switch k {
	case kindTime:
		return "is another time at every replay"
	case kindRandom:
		return "is another value at every replay"
	case kindIO:
		return "happens again at every replay, and may end otherwise"
	case kindGoroutine:
		return "leaves the order of what happens to chance"
	case kindChannel:
		return "depends on what other goroutines do"
	case kindLock:
		return "is held while the run is put aside to wait"
	default:
		return ""
	}
}

// travels reports whether a function that does such a thing is itself to be
// kept out of sagas. A lock in a helper guards what it guards; a range over a
// map is judged by what is done in the loop.
func (k kind) travels() bool {
	switch k {
	case kindTime, kindRandom, kindIO, kindGoroutine, kindChannel:
		return true
	default:
		return false
	}
}

// advice is what to do instead.
type advice string

const (
	adviceNow      advice = "now"
	adviceWait     advice = "wait"
	adviceWithin   advice = "within"
	adviceRecord   advice = "record"
	adviceStep     advice = "step"
	adviceExecute  advice = "execute"
	adviceBranches advice = "branches"
	adviceAwait    advice = "await"
	adviceShare    advice = "share"
)

// source is something that makes code not deterministic.
type source struct {
	kind   kind
	name   string // as code calls it: "time.Now"
	advice advice
}

// rule lists what of one package is a source. The path is without a version.
type rule struct {
	path   string
	kind   kind
	advice advice
	// names are functions, variables, and methods as Type.Method; a * at the end
	// stands for everything that begins so. What is in except is left out.
	names, except string
}

var rules = []rule{
	{"time", kindTime, adviceNow, "Now Since Until", ""},
	{"time", kindTime, adviceWait, "Sleep After Tick NewTimer NewTicker", ""},
	{"time", kindGoroutine, adviceWait, "AfterFunc", ""},
	{"context", kindTime, adviceWithin, "WithTimeout* WithDeadline*", ""},
	{"context", kindGoroutine, adviceBranches, "AfterFunc", ""},

	// What is made from a seed is as good as the seed.
	{"math/rand", kindRandom, adviceRecord, "*", "New* Rand.* Zipf.* PCG.* ChaCha8.* Source.* Source64.*"},
	{"crypto/rand", kindRandom, adviceRecord, "*", ""},
	{"hash/maphash", kindRandom, adviceRecord, "MakeSeed", ""},
	{"github.com/google/uuid", kindRandom, adviceRecord, "New NewString NewRandom NewUUID NewV6 NewV7 NewDCE*", ""},
	{"github.com/gofrs/uuid", kindRandom, adviceRecord, "NewV1 NewV4 NewV6 NewV7", ""},
	{"github.com/oklog/ulid", kindRandom, adviceRecord, "Make Now", ""},
	{"github.com/rs/xid", kindRandom, adviceRecord, "New", ""},
	{"github.com/segmentio/ksuid", kindRandom, adviceRecord, "New NewRandom*", ""},

	{"os", kindIO, adviceStep, "Getenv LookupEnv Environ ExpandEnv Hostname Getpid Getwd UserHomeDir", ""},
	{"os", kindIO, adviceStep, "Open* Create* ReadFile ReadDir WriteFile Stat Lstat Mkdir* Remove* Rename Truncate Chmod Chtimes Link Symlink Readlink CopyFS DirFS", ""},
	{"io/ioutil", kindIO, adviceStep, "ReadFile ReadDir WriteFile TempFile TempDir", ""},
	{"path/filepath", kindIO, adviceStep, "Walk WalkDir Glob EvalSymlinks", ""},
	{"os/exec", kindIO, adviceStep, "Command CommandContext LookPath", ""},
	{"net", kindIO, adviceStep, "Dial* Listen* Lookup* Dialer.Dial* Resolver.Lookup*", ""},
	{"net/http", kindIO, adviceStep, "Get Post PostForm Head ListenAndServe* Client.*", "Client.CloseIdleConnections"},
	{"net/smtp", kindIO, adviceStep, "SendMail Dial", ""},
	{"database/sql", kindIO, adviceStep, "DB.* Tx.* Conn.* Stmt.* Rows.* Row.*", ""},
	{"github.com/jackc/pgx", kindIO, adviceStep, "Connect* Conn.* Tx.*", ""},
	{"github.com/jackc/pgx/v5/pgxpool", kindIO, adviceStep, "Pool.* Conn.* Tx.*", ""},

	{"sync", kindGoroutine, adviceBranches, "WaitGroup.Go", ""},
	{"golang.org/x/sync/errgroup", kindGoroutine, adviceBranches, "Group.Go Group.TryGo", ""},
	{"sync", kindLock, adviceShare, "Mutex.Lock Mutex.TryLock RWMutex.Lock RWMutex.TryLock RWMutex.RLock RWMutex.TryRLock Locker.Lock", ""},
	{"sync", kindChannel, adviceAwait, "Cond.Wait", ""},
}

var version = regexp.MustCompile(`/v[0-9]+$`)

// sourceOf returns what is known of a function or a package's variable, nil if
// it is not known for anything.
func sourceOf(obj types.Object) *source {
	if obj.Pkg() == nil {
		return nil
	}
	name := obj.Name()
	if fn, ok := obj.(*types.Func); ok {
		if s := deedSource(fn); s != nil {
			return s
		}
		if receiver := receiverName(fn); receiver != "" {
			name = receiver + "." + name
		}
	}
	path := version.ReplaceAllString(obj.Pkg().Path(), "")
	for _, r := range rules {
		if r.path == path && listed(r.names, name) && !listed(r.except, name) {
			return &source{r.kind, obj.Pkg().Name() + "." + name, r.advice}
		}
	}
	return nil
}

func listed(names, name string) bool {
	for entry := range strings.FieldsSeq(names) {
		prefix, open := strings.CutSuffix(entry, "*")
		if entry == name || open && strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// deedSource finds what deed itself does in the outside world: what takes a
// context and may fail, or yields as it goes on. A function that takes the run
// is a step, one that takes a Step is for steps.
func deedSource(fn *types.Func) *source {
	path := plainPath(fn.Pkg())
	inside, ok := strings.CutPrefix(path, deedPath)
	if !ok || inside != "" && inside[0] != '/' || strings.HasPrefix(inside, "/cmd/") || strings.HasPrefix(inside, "/examples/") || strings.HasSuffix(path, "_test") {
		return nil
	}
	signature := fn.Signature()
	takes := func(is func(types.Type) bool) bool { return anyOf(signature.Params(), is) }
	if !fn.Exported() || takes(isRun) || takes(isStep) || !takes(isContext) || !anyOf(signature.Results(), mayFail) {
		return nil
	}
	name := fn.Pkg().Name() + "." + fn.Name()
	if receiver := receiverName(fn); receiver != "" {
		name = fn.Pkg().Name() + "." + receiver + "." + fn.Name()
	}
	if fn.Name() == "Execute" && receiverName(fn) == "" {
		return &source{kindIO, name, adviceExecute}
	}
	return &source{kindIO, name, adviceStep}
}

func anyOf(vars *types.Tuple, is func(types.Type) bool) bool {
	for v := range vars.Variables() {
		if is(v.Type()) {
			return true
		}
	}
	return false
}

// plainPath is a package's path without what go vet adds to that of a package
// built for a test.
func plainPath(pkg *types.Package) string {
	path, _, _ := strings.Cut(pkg.Path(), " ")
	return path
}

func isNamed(t types.Type, path, name string) bool {
	named, ok := types.Unalias(t).(*types.Named)
	return ok && named.Obj().Name() == name && named.Obj().Pkg() != nil && plainPath(named.Obj().Pkg()) == path
}

func isRun(t types.Type) bool {
	pointer, ok := types.Unalias(t).(*types.Pointer)
	return ok && isNamed(pointer.Elem(), sagaPath, "Run")
}

func isStep(t types.Type) bool    { return isNamed(t, sagaPath, "Step") }
func isContext(t types.Type) bool { return isNamed(t, "context", "Context") }

// mayFail reports whether a result is an error, or an iterator that yields some.
func mayFail(t types.Type) bool {
	if _, ok := t.Underlying().(*types.Signature); ok {
		return true
	}
	return types.Identical(t, types.Universe.Lookup("error").Type())
}

func isSaga(pkg *types.Package) bool { return pkg != nil && plainPath(pkg) == sagaPath }

// receiverName returns the name of a method's type, "" for a function.
func receiverName(fn *types.Func) string {
	receiver := fn.Signature().Recv()
	if receiver == nil {
		return ""
	}
	t := types.Unalias(receiver.Type())
	if pointer, ok := t.(*types.Pointer); ok {
		t = types.Unalias(pointer.Elem())
	}
	if named, ok := t.(*types.Named); ok {
		return named.Obj().Name()
	}
	return ""
}

// nameOf is how code in pkg speaks of a function or variable.
func nameOf(obj types.Object, pkg *types.Package) string {
	name := obj.Name()
	if fn, ok := obj.(*types.Func); ok {
		if receiver := receiverName(fn); receiver != "" {
			name = receiver + "." + name
		}
	}
	if obj.Pkg() != nil && obj.Pkg() != pkg {
		name = obj.Pkg().Name() + "." + name
	}
	return name
}
