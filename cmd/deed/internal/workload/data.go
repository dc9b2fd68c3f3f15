package workload

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/deed-go/deed/eventstore"
)

// noted is the event that every workload stores: an order with a note that fills
// it up to the size that was asked for.
type noted struct {
	Order    string `json:"order"`
	Customer string `json:"customer"`
	Cents    int64  `json:"cents"`
	Note     string `json:"note"`
}

const notedType = "bench.noted"

// EventType names the event.
func (noted) EventType() string { return notedType }

// newNoted returns an event whose JSON has so many bytes, or as few as possible.
func newNoted(size int) noted {
	n := noted{Order: "0199c0de-0000-7000-8000-000000000001", Customer: "customer-000042", Cents: 129_900}
	n.Note = strings.Repeat("x", max(0, size-len(encode(n))))
	return n
}

func newData(size int) []byte { return encode(newNoted(size)) }

func encode(n noted) []byte {
	data, err := json.Marshal(n)
	if err != nil {
		panic(err) // strings and a number
	}
	return data
}

// metadata accompanies every event, as it would an application's: some 50 bytes.
var metadata = eventstore.Metadata{CorrelationID: "7f3a90", Actor: "customer-000042"}

// Tagging says which tags events carry.
type Tagging struct {
	// Count is the number of tags of each event.
	Count int
	// Space is the number of different tags of each kind; the first kind has a tenth.
	Space int
}

func (t Tagging) validate() error {
	const most = 32
	if err := between("tags", t.Count, 0, most); err != nil {
		return err
	}
	if t.Space < 10 {
		return fmt.Errorf("--tag-space %d: use at least 10", t.Space)
	}
	return nil
}

// draw returns the tags of one event.
func (t Tagging) draw(random *rand.Rand) []string {
	if t.Count == 0 {
		return nil
	}
	tags := make([]string, t.Count)
	for i := range tags {
		switch i {
		case 0:
			tags[i] = fmt.Sprint("course:", random.IntN(t.Space/10))
		case 1:
			tags[i] = fmt.Sprint("student:", random.IntN(t.Space))
		default:
			tags[i] = fmt.Sprint("tag", i+1, ":", random.IntN(t.Space))
		}
	}
	return tags
}

func newRandom() *rand.Rand { return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())) }
