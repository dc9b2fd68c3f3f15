package eventstore

import (
	stdjson "encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"
)

// Codec turns values of the domain into bytes and back. Its name is stored
// beside every event it encoded (JSON, the default, stores none), so that a
// type's codec can change while old events stay readable.
type Codec interface {
	Name() string
	Marshal(value any) ([]byte, error)
	// Unmarshal decodes into the value that the pointer refers to.
	Unmarshal(data []byte, pointer any) error
}

// JSON returns the default codec, with the struct tags and the semantics of
// encoding/json; unknown fields are ignored.
func JSON() Codec { return jsonCodec{} }

type jsonCodec struct{}

func (jsonCodec) Name() string                       { return "" }
func (jsonCodec) Marshal(value any) ([]byte, error)  { return stdjson.Marshal(value) }
func (jsonCodec) Unmarshal(data []byte, p any) error { return json.Unmarshal(data, p, standard) }

// standard makes the faster library read as encoding/json does. Its own options
// for that know their own type of number, not that of encoding/json.
var standard = json.JoinOptions(jsonv1.DefaultOptionsV1(), json.WithUnmarshalers(
	json.UnmarshalFromFunc(func(d *jsontext.Decoder, n *stdjson.Number) error {
		value, err := d.ReadValue()
		if err != nil {
			return err
		}
		return stdjson.Unmarshal(value, n)
	}),
))

// Encoding knows how each event type is stored, and how what was stored under
// older schemas or names becomes what the program knows today. It is immutable
// and safe for concurrent use. The nil Encoding is JSON without upcasters.
type Encoding struct {
	fallback Codec
	byType   map[string]Codec
	byName   map[string]Codec
	steps    map[schema]func([]byte) ([]byte, error)
	current  map[string]int    // type -> current schema version, where above 1
	renames  map[string]string // old type -> new type
}

type schema struct {
	eventType string
	version   int
}

// EncodingOption is one rule of an [Encoding].
type EncodingOption func(*Encoding) error

// NewEncoding joins the rules; all mistakes in them are reported at once.
func NewEncoding(options ...EncodingOption) (*Encoding, error) {
	e := &Encoding{
		fallback: JSON(),
		byType:   map[string]Codec{},
		byName:   map[string]Codec{"": JSON()},
		steps:    map[schema]func([]byte) ([]byte, error){},
		current:  map[string]int{},
		renames:  map[string]string{},
	}
	var mistakes []error
	for _, option := range options {
		if err := option(e); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	for s := range e.steps {
		if s.version > 1 && e.steps[schema{s.eventType, s.version - 1}] == nil {
			mistakes = append(mistakes, fmt.Errorf("%w: event type %q has an upcaster from schema version %d but none from %d", ErrInvalid, s.eventType, s.version, s.version-1))
		}
	}
	for old := range e.renames {
		seen := []string{old}
		for next, ok := e.renames[old]; ok; next, ok = e.renames[next] {
			if slices.Contains(seen, next) {
				mistakes = append(mistakes, fmt.Errorf("%w: event type %q is renamed in a circle: %q", ErrInvalid, old, seen))
				break
			}
			seen = append(seen, next)
		}
	}
	if len(mistakes) > 0 {
		return nil, errors.Join(mistakes...)
	}
	return e, nil
}

// UseCodec makes the codec write the given event types, or, with no types,
// every type that has no codec of its own. It also reads what it once wrote.
func UseCodec(codec Codec, types ...string) EncodingOption {
	return func(e *Encoding) error {
		if codec == nil {
			return fmt.Errorf("%w: the codec of event types %q is nil", ErrInvalid, types)
		}
		if known, ok := e.byName[codec.Name()]; ok && known != codec {
			return fmt.Errorf("%w: two codecs are named %q", ErrInvalid, codec.Name())
		}
		e.byName[codec.Name()] = codec
		if len(types) == 0 {
			e.fallback = codec
		}
		for _, t := range types {
			if _, ok := e.byType[t]; ok {
				return fmt.Errorf("%w: event type %q has two codecs", ErrInvalid, t)
			}
			e.byType[t] = codec
		}
		return nil
	}
}

// UpcastBytes leads events of the type from one schema version to the next:
// up gets the data as stored and returns it as version from+1 would have been
// stored, by the same codec. The type's current version is one above its
// highest upcaster; events are written with it.
func UpcastBytes(eventType string, from int, up func([]byte) ([]byte, error)) EncodingOption {
	return func(e *Encoding) error {
		if from < 1 {
			return fmt.Errorf("%w: event type %q: upcasters start from schema version 1, got %d", ErrInvalid, eventType, from)
		}
		if up == nil {
			return fmt.Errorf("%w: event type %q: the upcaster from schema version %d is nil", ErrInvalid, eventType, from)
		}
		if _, ok := e.steps[schema{eventType, from}]; ok {
			return fmt.Errorf("%w: event type %q has two upcasters from schema version %d", ErrInvalid, eventType, from)
		}
		e.steps[schema{eventType, from}] = up
		e.current[eventType] = max(e.current[eventType], from+1)
		return nil
	}
}

// Upcast is [UpcastBytes] for types stored as JSON, by typed values: Old is
// the shape of version from, New that of version from+1.
func Upcast[Old, New any](eventType string, from int, up func(Old) (New, error)) EncodingOption {
	if up == nil {
		return UpcastBytes(eventType, from, nil)
	}
	return UpcastBytes(eventType, from, func(data []byte) ([]byte, error) {
		var old Old
		if err := JSON().Unmarshal(data, &old); err != nil {
			return nil, err
		}
		value, err := up(old)
		if err != nil {
			return nil, err
		}
		return JSON().Marshal(value)
	})
}

// Rename reads events stored under the old name, upcast as far as the old name
// goes, as the new type's schema version 1, and then on along its upcasters.
func Rename(oldType, newType string) EncodingOption {
	return func(e *Encoding) error {
		if _, ok := e.renames[oldType]; ok {
			return fmt.Errorf("%w: event type %q is renamed twice", ErrInvalid, oldType)
		}
		if oldType == newType {
			return fmt.Errorf("%w: event type %q is renamed to itself", ErrInvalid, oldType)
		}
		e.renames[oldType] = newType
		return nil
	}
}

func (e *Encoding) codecFor(eventType string) Codec {
	if e == nil {
		return JSON()
	}
	if c, ok := e.byType[eventType]; ok {
		return c
	}
	return e.fallback
}

// Schema returns the schema version and the name of the codec with which events
// of the type are written: 1 and "" where nothing says otherwise.
func (e *Encoding) Schema(eventType string) (version int, codec string) {
	version, codec = 1, e.codecFor(eventType).Name()
	if e != nil {
		version = max(version, e.current[eventType])
	}
	return version, codec
}

// CurrentType follows renames: it is the name under which handlers know events
// that are stored as the given type.
func (e *Encoding) CurrentType(stored string) string {
	if e == nil {
		return stored
	}
	for next, ok := e.renames[stored]; ok; next, ok = e.renames[stored] {
		stored = next
	}
	return stored
}

// StoredTypes returns the given current types and every older name that leads
// to one of them: what a query must ask for to see all of them.
func (e *Encoding) StoredTypes(current ...string) []string {
	all := slices.Clone(current)
	if e == nil {
		return all
	}
	var olds []string
	for old := range e.renames {
		if slices.Contains(current, e.CurrentType(old)) && !slices.Contains(all, old) {
			olds = append(olds, old)
		}
	}
	slices.Sort(olds)
	return append(all, olds...)
}

// Encode returns the stored form of a value of the event type, and sets the
// schema version and codec in the metadata.
func (e *Encoding) Encode(eventType string, value any, m *Metadata) ([]byte, error) {
	codec := e.codecFor(eventType)
	data, err := codec.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("%w: event %q does not encode: %w", ErrInvalid, eventType, err)
	}
	m.Codec = codec.Name()
	m.SchemaVersion = 0
	if e != nil {
		m.SchemaVersion = e.current[eventType]
	}
	return data, nil
}

// Upcast returns the event as if it had been written today: current type name
// and current schema version. Without anything to do it returns r itself.
func (e *Encoding) Upcast(r Recorded) (Recorded, error) {
	version := max(r.Metadata.SchemaVersion, 1)
	if e == nil || len(e.steps) == 0 && len(e.renames) == 0 {
		if version > 1 {
			return r, newerSchema(&r, version, 1)
		}
		return r, nil
	}
	for {
		if up, ok := e.steps[schema{r.Type, version}]; ok {
			data, err := up(r.Data)
			if err != nil {
				return r, &DecodeError{Event: r, Cause: fmt.Errorf("upcast from schema version %d: %w", version, err)}
			}
			version++
			r.Data, r.Metadata.SchemaVersion = data, version
			continue
		}
		if current := max(e.current[r.Type], 1); version > current {
			return r, newerSchema(&r, version, current)
		}
		next, ok := e.renames[r.Type]
		if !ok {
			return r, nil
		}
		r.Type, r.Metadata.SchemaVersion, version = next, 0, 1
	}
}

func newerSchema(r *Recorded, version, known int) error {
	return &DecodeError{Event: *r, Cause: fmt.Errorf("%w: schema version %d, this program knows up to %d: deploy the newer program first", ErrUnknownType, version, known)}
}

// Decode upcasts the event and decodes its data into the value that the
// pointer refers to.
func (e *Encoding) Decode(r Recorded, pointer any) error {
	r, err := e.Upcast(r)
	if err != nil {
		return err
	}
	var codec Codec = jsonCodec{}
	if r.Metadata.Codec != "" {
		var ok bool
		if e != nil {
			codec, ok = e.byName[r.Metadata.Codec]
		}
		if !ok {
			return &DecodeError{Event: r, Cause: fmt.Errorf("%w: codec %q: add it with eventstore.UseCodec", ErrUnknownType, r.Metadata.Codec)}
		}
	}
	if err := codec.Unmarshal(r.Data, pointer); err != nil {
		return &DecodeError{Event: r, Into: fmt.Sprintf("%T", pointer), Cause: err}
	}
	return nil
}

// DecodeError tells which stored event could not be understood. errors.Is
// recognises it as [ErrDecode], and as what its cause is.
type DecodeError struct {
	Event Recorded
	Into  string
	Cause error
}

// Error names the event and the cause.
func (e *DecodeError) Error() string {
	into := ""
	if e.Into != "" {
		into = " into " + e.Into
	}
	return fmt.Sprintf("cannot decode event %q (stream %q, version %d, position %d)%s: %v", e.Event.Type, clip(e.Event.Stream.String()), e.Event.Version, e.Event.Position, into, e.Cause)
}

// Is makes errors.Is(err, ErrDecode) hold.
func (e *DecodeError) Is(target error) bool { return target == ErrDecode }

// Unwrap returns the cause.
func (e *DecodeError) Unwrap() error { return e.Cause }
