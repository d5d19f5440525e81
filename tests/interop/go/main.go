// What grpc-go's own interop client does not try: gzip, large metadata, and a server that is replaced under calls.
//
// interop ADDRESS gzip|large_metadata|replaced; the last goes on until its standard input ends. Exits with 1 where something is wrong.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const echo = "x-grpc-test-echo"

func main() {
	log.SetFlags(0)
	connection, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client := testgrpc.NewTestServiceClient(connection)
	switch os.Args[2] {
	case "gzip":
		compressed(ctx, client)
	case "large_metadata":
		largeMetadata(ctx, client)
	case "replaced":
		replaced(ctx, client)
	default:
		log.Fatalf("there is no case %q", os.Args[2])
	}
}

func compressed(ctx context.Context, client testgrpc.TestServiceClient) {
	request := &testgrpc.SimpleRequest{ResponseSize: 314159, Payload: &testgrpc.Payload{Body: make([]byte, 271828)}}
	response, err := client.UnaryCall(ctx, request, grpc.UseCompressor(gzip.Name))
	if err != nil || len(response.GetPayload().GetBody()) != 314159 {
		log.Fatalf("a compressed unary call: %v, %d bytes", err, len(response.GetPayload().GetBody()))
	}
	stream, err := client.StreamingInputCall(ctx, grpc.UseCompressor(gzip.Name))
	if err != nil {
		log.Fatal(err)
	}
	for range 10 {
		if err := stream.Send(&testgrpc.StreamingInputCallRequest{Payload: request.Payload}); err != nil {
			log.Fatal(err)
		}
	}
	sum, err := stream.CloseAndRecv()
	if err != nil || sum.AggregatedPayloadSize != 2718280 {
		log.Fatalf("ten compressed messages: %v, %d bytes", err, sum.GetAggregatedPayloadSize())
	}
}

// Header blocks of more than one frame, which come back as they went; what is over the server's limit costs the call alone.
func largeMetadata(ctx context.Context, client testgrpc.TestServiceClient) {
	for _, size := range []int{100, 12_000, 14_000} {
		sent := strings.Repeat("v", size)
		with := metadata.AppendToOutgoingContext(ctx, echo, sent)
		response, err := client.UnaryCall(with, &testgrpc.SimpleRequest{})
		if err != nil || string(response.GetPayload().GetBody()) != sent {
			log.Fatalf("%d bytes of metadata: %v, %d came back", size, err, len(response.GetPayload().GetBody()))
		}
	}
	over := metadata.AppendToOutgoingContext(ctx, echo, strings.Repeat("v", 100_000))
	if _, err := client.UnaryCall(over, &testgrpc.SimpleRequest{}); err == nil {
		log.Fatal("100,000 bytes of metadata were taken")
	}
	if _, err := client.UnaryCall(ctx, &testgrpc.SimpleRequest{}); err != nil {
		log.Fatalf("the next call: %v", err)
	}
}

// Unary calls one after the other and a stream beside them: none of them may notice that its server is replaced.
func replaced(ctx context.Context, client testgrpc.TestServiceClient) {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		log.Fatal(err)
	}
	turn := &testgrpc.StreamingOutputCallRequest{ResponseParameters: []*testgrpc.ResponseParameters{{Size: 1000}}}
	servers, calls := map[string]int{}, 0
	for {
		response, err := client.UnaryCall(ctx, &testgrpc.SimpleRequest{FillServerId: true})
		if err != nil {
			log.Fatalf("call %d: %v", calls, err)
		}
		servers[response.ServerId]++
		if err := stream.Send(turn); err != nil {
			log.Fatalf("the stream's message %d: %v", calls, err)
		}
		if _, err := stream.Recv(); err != nil {
			log.Fatalf("the stream's answer %d: %v", calls, err)
		}
		if calls++; calls == 1 {
			fmt.Println("begun")
		}
		select {
		case <-ended:
			if err := stream.CloseSend(); err != nil {
				log.Fatal(err)
			}
			if _, err := stream.Recv(); err != io.EOF || status.Code(nil) != codes.OK {
				log.Fatalf("the end of the stream: %v", err)
			}
			fmt.Println(len(servers), "servers")
			return
		default:
		}
	}
}
